// SPDX-License-Identifier: Apache-2.0

//! The second data path of the inter-VM IP switch: vhost-user-net, from virtqueue to virtqueue.
//!
//! # What it is
//!
//! One process per host serves all its vhost-user NICs. Each of them has a tap as well, which is an ordinary port of
//! the switch in the kernel. A frame that is plainly fine is copied straight from the sender's queue into the
//! receiver's; any other is written to the sender's own tap, and the kernel's switch answers it, counts it, drops it or
//! forwards it. What comes from a port's tap goes to that port's guest. So there is one policy, written down once,
//! and this process never drops a frame for it: only for lack of room, and if it is malformed.
//!
//! ```text
//!      guest A             guest B             guest C (tap)        other hosts
//!     ┌───────┐           ┌───────┐           ┌───────┐                 │
//!     │ rings │           │ rings │           │ rings │                 │
//!     └──┬─▲──┘           └──┬─▲──┘           └──┬─▲──┘                 │
//!   ═════╪═╪═════════════════╪═╪════════ QEMU ═══╪═╪═══                 │
//!     ┌──▼─┴─────────────────▼─┴──┐              │ │                    │
//!     │    short cut: A ◄──► B    │              │ │                    │
//!     └──┬─▲─────────────────┬─▲──┘              │ │                    │
//!        │ │ everything else │ │                 │ │                    │
//!     ┌──▼─┴──┐           ┌──▼─┴──┐           ┌──▼─┴──┐           ┌─────┴────┐
//!     │ tap A │           │ tap B │           │ tap C │           │  VXLAN,  │
//!     └───┬───┘           └───┬───┘           └───┬───┘           │  uplink  │
//!   ══════╧═══════════════════╧══ kernel's switch ╧═══════════════╧═════╧════
//! ```
//!
//! # Where what is said
//!
//! | module | says |
//! |---|---|
//! | [`control`], [`wish`] | the control protocol |
//! | [`daemon`] | how a wish becomes ports |
//! | [`session`] | vhost-user, with a thread per VMM |
//! | [`poll`] | the data thread, and when it sleeps |
//! | [`switch`] | the way of a frame |
//! | [`frame`], [`list`] | what may take the short cut, and where to |
//! | [`head`] | the copy that is judged |
//! | [`port`], [`vring::ring`], [`vring::memory`] | queues in a guest's memory |
//! | [`tap`], [`vring::socket`] | links and sockets |
//! | [`vring::fault`], [`vring::sandbox`] | what a hostile VMM or guest cannot do |
//!
//! # What is trusted
//!
//! The control plane. Not a guest: what it writes into its rings and frames fails its own device at worst. Not a VMM
//! either, as far as it can be helped: what it says of memory and rings is checked, it can hold up only its own
//! thread, and memory that it takes away reads as zeros. It could still make its own eventfd block the data thread.
//!
//! # What is lost when the process is killed
//!
//! Nothing but frames. VMMs connect again by themselves and say where their rings go on; the control plane wishes the
//! same again; counters begin at zero.

pub mod control;
pub mod daemon;
pub mod frame;
pub mod head;
pub mod list;
pub mod poll;
pub mod port;
pub mod session;
pub mod switch;
pub mod tap;
pub mod wish;
