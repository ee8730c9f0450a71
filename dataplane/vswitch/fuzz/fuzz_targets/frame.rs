// SPDX-License-Identifier: Apache-2.0

//! Any frame: what passes is the sender's own, and says nothing that is not so.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vswitch::frame::{Address, EXAMINED, Identity, NetHeader, examine};

#[derive(Arbitrary, Debug)]
struct Input {
    header: [u8; 10],
    head: Vec<u8>,
    more: u16,
    mac: [u8; 6],
    ipv4: u32,
    ipv6: u128,
    link_local: u128,
    mtu: u16,
    /// The fuzzer need not guess addresses.
    own: bool,
}

fuzz_target!(|input: Input| {
    let Input { header, mut head, more, mac, ipv4, ipv6, link_local, mtu, own } = input;
    if own && head.len() >= 54 {
        head[6..12].copy_from_slice(&mac);
        match head[12..14] {
            [8, 0] => head[26..30].copy_from_slice(&ipv4.to_be_bytes()),
            _ => head[22..38].copy_from_slice(&ipv6.to_be_bytes()),
        }
    }
    let sender = Identity { mac, ipv4, ipv6, link_local, mtu: u32::from(mtu) };
    let length = if head.len() < EXAMINED { head.len() } else { head.len() + usize::from(more) };
    let header = NetHeader::parse(&header);
    let Some(datagram) = examine(&header, &head, length, &sender) else { return };
    assert_eq!(head[6..12], mac);
    assert_eq!(head[0] & 1, 0);
    match datagram.to {
        Address::V4(to) => {
            assert_eq!(head[26..30], ipv4.to_be_bytes());
            assert_eq!(head[30..34], to.to_be_bytes());
        }
        Address::V6(to) => {
            assert!(head[22..38] == ipv6.to_be_bytes() || head[22..38] == link_local.to_be_bytes());
            assert_eq!(head[38..54], to.to_be_bytes());
        }
    }
    assert!(datagram.needs != 0 || length <= usize::from(mtu) + 14);
});
