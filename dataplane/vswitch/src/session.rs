// SPDX-License-Identifier: Apache-2.0

//! One VMM on one port's socket: the vhost-user protocol.
//!
//! ```text
//!   accepted ──► features, protocol features ──► memory, rings (size, base, addresses, files) ──► rings enabled
//!                       ▲                                                                              │
//!                       └───────────────── GET_VRING_BASE for each ring (the guest resets) ────────────┘
//!   any ──► the socket is closed: all rings are stopped, the memory is unmapped
//! ```
//!
//! Each connection has a thread of its own, which does all that may take time (reading the socket, mapping memory) and
//! hands only the results to the data thread. A VMM that stops in the middle of a message thus holds up nobody.
//!
//! A request that makes no sense is refused, and the connection goes on, as long as it is clear where the next request
//! begins. Nothing is remembered of a VMM that has gone: the next one says all of it again, and its rings say where to
//! go on.
//!
//! # Rings that are enabled too early
//!
//! QEMU 7.2 enables the rings before it says which features the guest has negotiated, and not again afterwards. The
//! `vhost` crate insists on the order of the specification, so this request is taken from the socket here until the
//! features are known.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{MsgFlags, recv};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_config::{VIRTIO_F_ANY_LAYOUT, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vring::memory::{DirtyLog, GuestMemory, MAX_REGIONS, Region};
use vring::ring::Addresses;

use crate::poll::Handle;
use crate::port::{LOG_ALL, PROTOCOL_FEATURES};
use crate::switch::{SetupError, Switch};

/// What is offered to guests. (To announce themselves after a migration is up to them and their VMM; it is offered
/// because QEMU complains otherwise.)
pub const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_F_ANY_LAYOUT
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | LOG_ALL
    | PROTOCOL_FEATURES;

/// Bytes of a message's header: request, flags and size of the rest, 32 bits each.
const HEADER: usize = 12;
const SET_VRING_ENABLE: u32 = 18;
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

struct Session {
    name: String,
    slot: u32,
    pairs: u16,
    switch: Handle,
    memory: GuestMemory,
    features: u64,
}

fn refused(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

fn unsupported<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

fn region(region: &VhostUserMemoryRegion) -> Region {
    Region {
        guest: region.guest_phys_addr,
        size: region.memory_size,
        user: region.user_addr,
        offset: region.mmap_offset,
    }
}

/// Make a file of events one that nobody has to wait for.
fn event_file(file: Option<File>) -> Result<Option<OwnedFd>> {
    let Some(file) = file else { return Ok(None) };
    let nonblocking = || {
        let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
        fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))
    };
    nonblocking().map_err(refused)?;
    Ok(Some(file.into()))
}

impl Session {
    fn ask<R: Send + 'static>(
        &self,
        task: impl FnOnce(&mut Switch) -> std::result::Result<R, SetupError> + Send + 'static,
    ) -> Result<R> {
        let result = self.switch.run(task).map_err(refused)?;
        result.map_err(refused)
    }

    fn use_memory(&mut self, memory: GuestMemory) -> Result<()> {
        tracing::debug!(port = self.name, ?memory, "memory");
        let slot = self.slot;
        let shared = Arc::new(memory.clone());
        // What is not needed any more is unmapped by this thread, not by the one that gave it back.
        let before = self.ask(move |switch| switch.set_memory(slot, shared))?;
        self.memory = memory;
        drop(before);
        Ok(())
    }

    fn index(&self, index: u32) -> Result<u32> {
        if index < u32::from(2 * self.pairs) { Ok(index) } else { Err(refused(SetupError::NoQueue(index))) }
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        let slot = self.slot;
        self.ask(move |switch| switch.reset(slot))
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !FEATURES != 0 {
            return Err(Error::FeatureMismatch);
        }
        tracing::debug!(port = self.name, features = format_args!("{features:#x}"), "features");
        self.features = features;
        let slot = self.slot;
        self.ask(move |switch| switch.set_features(slot, features))
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let mut memory = GuestMemory::default();
        for (announced, file) in regions.iter().zip(&files) {
            memory = memory.with(region(announced), file).map_err(refused)?;
        }
        self.use_memory(memory)?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, size: u32) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        self.ask(move |switch| switch.set_size(slot, index, size))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        let used_log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        let addresses = Addresses { descriptors, available, used, used_log };
        self.ask(move |switch| switch.set_addresses(slot, index, addresses))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        self.ask(move |switch| switch.set_base(slot, index, base))
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // A VMM that asked for a ring that there is not would wait for an answer: the connection is given up.
        let (slot, index) = (self.slot, self.index(index).map_err(|_| Error::BackendInternalError)?);
        let base = self.ask(move |switch| switch.stop(slot, index)).map_err(|_| Error::BackendInternalError)?;
        tracing::debug!(port = self.name, queue = index, base, "queue stopped");
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, index) = (self.slot, self.index(u32::from(index))?);
        let file = event_file(file)?;
        tracing::debug!(port = self.name, queue = index, kick = file.is_some(), "queue started");
        self.ask(move |switch| switch.set_kick(slot, index, file))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, index) = (self.slot, self.index(u32::from(index))?);
        let file = event_file(file)?;
        self.ask(move |switch| switch.set_call(slot, index, file))
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, index) = (self.slot, self.index(u32::from(index))?);
        let file = event_file(file)?;
        self.ask(move |switch| switch.set_error(slot, index, file))
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(u64::from(self.pairs))
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (slot, index) = (self.slot, self.index(index)?);
        tracing::debug!(port = self.name, queue = index, enable, "queue enabled or disabled");
        self.ask(move |switch| switch.enable(slot, index, enable))
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        announced: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        let memory = self.memory.with(region(announced), &file).map_err(refused)?;
        self.use_memory(memory)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, announced: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self.memory.without(&region(announced)).map_err(refused)?;
        self.use_memory(memory)
    }

    fn get_config(&mut self, _offset: u32, _size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        unsupported("the VMM has the device's configuration")
    }

    fn set_config(&mut self, _offset: u32, _bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        unsupported("the VMM has the device's configuration")
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        unsupported("not a GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported("no shared objects")
    }

    fn get_inflight_fd(&mut self, _inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported("no buffer is ever in flight")
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported("no buffer is ever in flight")
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported("the device has no state")
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported("the device has no state")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported("no shared memory")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        // A VMM that is not answered here would wait: the connection is given up.
        let log = DirtyLog::new(&file, log.mmap_offset, log.mmap_size).map_err(|error| {
            tracing::warn!(port = self.name, %error, "no log of dirty pages");
            Error::BackendInternalError
        })?;
        tracing::debug!(port = self.name, ?log, "log of dirty pages");
        let (slot, log) = (self.slot, Arc::new(log));
        let before = self.ask(move |switch| switch.set_log(slot, log)).map_err(|_| Error::BackendInternalError)?;
        drop(before);
        Ok(())
    }
}

/// Take a request to enable a ring from the socket, if it is the next and comes before the features.
fn enable_early(stream: &mut UnixStream, session: &Mutex<Session>) -> io::Result<()> {
    let word = |bytes: &[u8], at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mut session = session.lock().unwrap_or_else(PoisonError::into_inner);
    while session.features & PROTOCOL_FEATURES == 0 {
        let mut message = [0; HEADER + 8];
        let seen = recv(stream.as_raw_fd(), &mut message[..HEADER], MsgFlags::MSG_PEEK)?;
        let expected = seen == HEADER && word(&message, 0) == SET_VRING_ENABLE && word(&message, 8) == 8;
        if !expected {
            return Ok(());
        }
        stream.read_exact(&mut message)?;
        let (index, enable) = (word(&message, HEADER), word(&message, HEADER + 4));
        let result = session.set_vring_enable(index, enable == 1);
        if let Err(error) = &result {
            tracing::warn!(port = session.name, %error, "request refused");
        }
        if word(&message, 4) & NEED_REPLY != 0 {
            let mut answer = Vec::with_capacity(HEADER + 8);
            for part in [SET_VRING_ENABLE, VERSION | REPLY, 8, u32::from(result.is_err()), 0] {
                answer.extend(part.to_ne_bytes());
            }
            stream.write_all(&answer)?;
        }
    }
    Ok(())
}

/// Serve a VMM until it goes.
pub fn serve(mut stream: UnixStream, switch: &Handle, slot: u32, name: &str, pairs: u16) {
    tracing::info!(port = name, "connected");
    if switch.run(move |switch| switch.connect(slot, true)).is_err() {
        return;
    }
    let (switch_, memory) = (switch.clone(), GuestMemory::default());
    let session = Session { name: name.to_owned(), slot, pairs, switch: switch_, memory, features: 0 };
    let session = Arc::new(Mutex::new(session));
    if let Ok(theirs) = stream.try_clone() {
        let mut handler = BackendReqHandler::from_stream(theirs, session.clone());
        while enable_early(&mut stream, &session).is_ok() && handle(&mut handler, name) {}
    }
    tracing::info!(port = name, "disconnected");
    // What is given back is unmapped here.
    let before = switch.run(move |switch| switch.connect(slot, false));
    drop(before);
}

/// Handle one request; false if no other can follow.
fn handle(handler: &mut BackendReqHandler<Mutex<Session>>, name: &str) -> bool {
    match handler.handle_request() {
        Ok(()) => true,
        // The request was understood, and the VMM is told so if it has asked.
        Err(
            error @ (Error::ReqHandlerError(_)
            | Error::InvalidOperation(_)
            | Error::FeatureMismatch
            | Error::InactiveFeature(_)),
        ) => {
            tracing::warn!(port = name, %error, "request refused");
            true
        }
        Err(Error::Disconnected | Error::SocketBroken(_) | Error::PartialMessage) => false,
        Err(error) => {
            tracing::warn!(port = name, %error, "connection given up");
            false
        }
    }
}
