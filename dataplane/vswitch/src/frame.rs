// SPDX-License-Identifier: Apache-2.0

//! What a frame says, and whether it may take the short cut.
//!
//! Nothing here touches a guest's memory: the caller copies the first bytes of the frame, asks [`examine`] about that
//! copy, and sends *that copy* on. A guest that changes its buffer meanwhile changes nothing that was decided.
//!
//! # Which frames may take the short cut
//!
//! Only what is plainly fine. Everything else goes to the kernel's switch, which answers, counts, drops or forwards
//! it, so the policy is written down once. A frame is plainly fine if
//!
//! * its destination MAC is not a group's, its source MAC and its source address are the sender's own;
//! * it is IPv4 or IPv6 with no VLAN tag, and its lengths agree with the frame's and with the network's MTU;
//! * it is no fragment, and has no extension header (RFC 8200, section 4);
//! * it is no neighbour discovery (RFC 4861), which is the switch's own business;
//! * what it leaves to the receiver (a checksum, the segmentation of TCP) is described consistently in its
//!   `virtio_net_hdr` (VIRTIO 1.2, section 5.1.6).
//!
//! Whom it is for, and whether sender and receiver may talk, is looked up by the caller.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of `struct virtio_net_hdr_v1`, which taps and modern devices use.
pub const NET_HEADER: usize = 12;
/// Bytes of `struct virtio_net_hdr`, which legacy devices without mergeable buffers use.
pub const LEGACY_NET_HEADER: usize = 10;
/// Bytes of the largest frame: a datagram, its Ethernet header and a VLAN tag.
pub const MAX_FRAME: usize = 65535 + ETHERNET + 4;
/// How much of a frame [`examine`] wants to see: Ethernet, IPv6 and the type of an ICMPv6 message.
pub const EXAMINED: usize = ETHERNET + IPV6 + 1;

const IPV4: usize = 20;
const IPV6: usize = 40;
const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;
const IPV4_MORE_AND_OFFSET: u16 = 0x3fff;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_ICMPV6: u8 = 58;
const TCP_CHECKSUM: u16 = 16;
const ND_FIRST: u8 = 133;
const ND_LAST: u8 = 137;

/// Who may send what: the addresses of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Ethernet address.
    pub mac: [u8; 6],
    /// IPv4 address; 0: none.
    pub ipv4: u32,
    /// IPv6 address; 0: none.
    pub ipv6: u128,
    /// IPv6 address in `fe80::/64`; 0: none.
    pub link_local: u128,
    /// Bytes of the largest datagram.
    pub mtu: u32,
}

/// An address of either family, in host byte order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// IPv4.
    V4(u32),
    /// IPv6.
    V6(u128),
}

/// A frame that may take the short cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Its destination.
    pub to: Address,
    /// Features (bits of VIRTIO 1.2, section 5.1.3) that the receiver must have negotiated to get it as it is.
    pub needs: u64,
}

/// `struct virtio_net_hdr` without the number of buffers, which is the receiver's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetHeader {
    /// `VIRTIO_NET_HDR_F_…`.
    pub flags: u8,
    /// `VIRTIO_NET_HDR_GSO_…`.
    pub gso_type: u8,
    /// Bytes of Ethernet, IP and TCP header.
    pub header_length: u16,
    /// Bytes of TCP payload in each segment.
    pub gso_size: u16,
    /// Where the checksum begins.
    pub checksum_start: u16,
    /// Where, after that, it is to be written.
    pub checksum_offset: u16,
}

impl NetHeader {
    /// Read it from its first ten bytes.
    pub fn parse(bytes: &[u8; LEGACY_NET_HEADER]) -> Self {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        NetHeader {
            flags: bytes[0],
            gso_type: bytes[1],
            header_length: half(2),
            gso_size: half(4),
            checksum_start: half(6),
            checksum_offset: half(8),
        }
    }

    /// Its ten bytes as words, the first byte lowest.
    #[inline]
    pub fn words(&self) -> (u64, u16) {
        let first = u64::from(self.flags)
            | u64::from(self.gso_type) << 8
            | u64::from(self.header_length) << 16
            | u64::from(self.gso_size) << 32
            | u64::from(self.checksum_start) << 48;
        (first, self.checksum_offset)
    }

    /// Whether there is nothing that the receiver has to do.
    pub fn is_plain(&self) -> bool {
        self.flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM as u8) == 0 && self.gso_type == VIRTIO_NET_HDR_GSO_NONE as u8
    }

    /// The [`words`](Self::words) with only what a receiver may see: the driver that sends has no say over the rest.
    #[inline]
    pub fn forwarded(&self) -> (u64, u16) {
        if self.is_plain() {
            return (0, 0);
        }
        NetHeader { flags: VIRTIO_NET_HDR_F_NEEDS_CSUM as u8, ..*self }.words()
    }

    /// Features that a receiver must have negotiated to get a frame with this header; None for what has no feature.
    pub fn needs(&self) -> Option<u64> {
        let mut needs = 0;
        if self.flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM as u8) != 0 {
            needs |= 1 << VIRTIO_NET_F_GUEST_CSUM;
        }
        if self.gso_type & (VIRTIO_NET_HDR_GSO_ECN as u8) != 0 {
            needs |= 1 << VIRTIO_NET_F_GUEST_ECN;
        }
        match u32::from(self.gso_type) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => {}
            VIRTIO_NET_HDR_GSO_TCPV4 => needs |= 1 << VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_HDR_GSO_TCPV6 => needs |= 1 << VIRTIO_NET_F_GUEST_TSO6,
            _ => return None,
        }
        Some(needs)
    }

    /// Take away what is only said of a checksum: receivers without `VIRTIO_NET_F_GUEST_CSUM` must not see it.
    pub fn hide_valid(&mut self) {
        self.flags &= !(VIRTIO_NET_HDR_F_DATA_VALID as u8);
    }
}

/// Whether a frame may take the short cut, and where to.
///
/// `head` is the beginning of the frame (all of it, or at least [`EXAMINED`] bytes), `length` its whole length.
#[inline]
pub fn examine(header: &NetHeader, head: &[u8], length: usize, sender: &Identity) -> Option<Datagram> {
    if head.len() < ETHERNET + IPV4 || head[0] & 1 != 0 || head[6..12] != sender.mac {
        return None;
    }
    let datagram = match u16::from_be_bytes([head[12], head[13]]) {
        ETHERTYPE_IPV4 => ipv4(head, length, sender)?,
        ETHERTYPE_IPV6 => ipv6(head, length, sender)?,
        _ => return None,
    };
    let needs = if header.is_plain() {
        if length > sender.mtu as usize + ETHERNET {
            return None;
        }
        0
    } else {
        unfinished(header, length, sender, &datagram)?
    };
    Some(Datagram { to: datagram.to, needs })
}

struct Parsed {
    to: Address,
    protocol: u8,
    /// Offset of what follows the IP header.
    payload: usize,
}

#[inline]
fn ipv4(head: &[u8], length: usize, sender: &Identity) -> Option<Parsed> {
    let ip = head.get(ETHERNET..ETHERNET + IPV4)?;
    let header = usize::from(ip[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let fragment = u16::from_be_bytes([ip[6], ip[7]]);
    let from = u32::from_be_bytes([ip[12], ip[13], ip[14], ip[15]]);
    if ip[0] >> 4 != 4
        || header < IPV4
        || total < header
        || total > length - ETHERNET
        || fragment & IPV4_MORE_AND_OFFSET != 0
        || from != sender.ipv4
        || from == 0
    {
        return None;
    }
    let to = u32::from_be_bytes([ip[16], ip[17], ip[18], ip[19]]);
    Some(Parsed { to: Address::V4(to), protocol: ip[9], payload: ETHERNET + header })
}

#[inline]
fn ipv6(head: &[u8], length: usize, sender: &Identity) -> Option<Parsed> {
    let ip = head.get(ETHERNET..ETHERNET + IPV6)?;
    let payload = usize::from(u16::from_be_bytes([ip[4], ip[5]]));
    let protocol = ip[6];
    let from = u128::from_be_bytes(ip[8..24].try_into().ok()?);
    let to = u128::from_be_bytes(ip[24..40].try_into().ok()?);
    // A length of 0 is that of a jumbogram (RFC 2675): rare enough for the kernel's switch.
    if ip[0] >> 4 != 6
        || payload == 0
        || payload > length - ETHERNET - IPV6
        || from == 0
        || (from != sender.ipv6 && from != sender.link_local)
        || is_extension(protocol)
    {
        return None;
    }
    if protocol == PROTOCOL_ICMPV6 && (ND_FIRST..=ND_LAST).contains(head.get(ETHERNET + IPV6)?) {
        return None;
    }
    Some(Parsed { to: Address::V6(to), protocol, payload: ETHERNET + IPV6 })
}

/// The extension headers of IANA's list, and "no next header", which carries nothing.
#[inline]
fn is_extension(protocol: u8) -> bool {
    matches!(protocol, 0 | 43 | 44 | 50 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254)
}

/// Whether what a header leaves to the receiver makes sense for the frame: the features that it needs.
fn unfinished(header: &NetHeader, length: usize, sender: &Identity, datagram: &Parsed) -> Option<u64> {
    let needs = header.needs()?;
    let start = usize::from(header.checksum_start);
    let field = start + usize::from(header.checksum_offset);
    if header.flags & (VIRTIO_NET_HDR_F_NEEDS_CSUM as u8) == 0 || start < datagram.payload || field + 2 > length {
        return None;
    }
    let kind = u32::from(header.gso_type) & !VIRTIO_NET_HDR_GSO_ECN;
    if kind == VIRTIO_NET_HDR_GSO_NONE {
        let plain = header.gso_type == VIRTIO_NET_HDR_GSO_NONE as u8;
        return (plain && length <= sender.mtu as usize + ETHERNET).then_some(needs);
    }
    let family = matches!(
        (kind, datagram.to),
        (VIRTIO_NET_HDR_GSO_TCPV4, Address::V4(_)) | (VIRTIO_NET_HDR_GSO_TCPV6, Address::V6(_))
    );
    let consistent = family
        && datagram.protocol == PROTOCOL_TCP
        && start == datagram.payload
        && header.checksum_offset == TCP_CHECKSUM
        && header.gso_size != 0
        && u32::from(header.gso_size) <= sender.mtu
        && usize::from(header.header_length) <= length;
    consistent.then_some(needs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn sender() -> Identity {
        Identity { mac: MAC, ipv4: 0x0a0a_0001, ipv6: 0xfd10 << 112 | 1, link_local: 0xfe80 << 112 | 1, mtu: 1500 }
    }

    fn udp4() -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[0] = 2;
        frame[6..12].copy_from_slice(&MAC);
        frame[12] = 8;
        frame[14] = 0x45;
        frame[17] = 46;
        frame[22] = 64;
        frame[23] = 17;
        frame[26..30].copy_from_slice(&0x0a0a_0001_u32.to_be_bytes());
        frame[30..34].copy_from_slice(&0x0a0a_0002_u32.to_be_bytes());
        frame
    }

    fn ip6(protocol: u8) -> Vec<u8> {
        let mut frame = vec![0; 80];
        frame[0] = 2;
        frame[6..12].copy_from_slice(&MAC);
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14] = 0x60;
        frame[19] = 26;
        frame[20] = protocol;
        frame[22..38].copy_from_slice(&(0xfd10_u128 << 112 | 1).to_be_bytes());
        frame[38..54].copy_from_slice(&(0xfd10_u128 << 112 | 2).to_be_bytes());
        frame
    }

    fn ask(frame: &[u8]) -> Option<Datagram> {
        examine(&NetHeader::default(), frame, frame.len(), &sender())
    }

    fn refused(change: impl Fn(&mut Vec<u8>)) {
        let mut frame = udp4();
        change(&mut frame);
        assert_eq!(ask(&frame), None);
    }

    #[test]
    fn test_examine_plain_ipv4_is_short_cut() {
        assert_eq!(ask(&udp4()), Some(Datagram { to: Address::V4(0x0a0a_0002), needs: 0 }));
    }

    #[test]
    fn test_examine_plain_ipv6_is_short_cut() {
        assert_eq!(ask(&ip6(17)), Some(Datagram { to: Address::V6(0xfd10 << 112 | 2), needs: 0 }));
    }

    #[test]
    fn test_examine_anything_else_is_left_to_the_kernel() {
        refused(|f| f[0] = 1); // multicast
        refused(|f| f[11] = 9); // somebody else's MAC
        refused(|f| f[29] = 9); // somebody else's address
        refused(|f| f[12..14].copy_from_slice(&[8, 6])); // ARP
        refused(|f| f[12..14].copy_from_slice(&[0x81, 0])); // 802.1Q
        refused(|f| f[14] = 0x44); // header too short
        refused(|f| f[14] = 0x65); // version
        refused(|f| f[17] = 47); // longer than the frame
        refused(|f| f[17] = 19); // shorter than its header
        refused(|f| f[20] = 0x20); // more fragments
        refused(|f| f[21] = 1); // a later fragment
        refused(|f| f.truncate(33));
        refused(|f| f.resize(1515, 0)); // larger than the MTU
    }

    #[test]
    fn test_examine_ipv6_extension_or_discovery_is_left_to_the_kernel() {
        for extension in [0, 43, 44, 51, 60] {
            assert_eq!(ask(&ip6(extension)), None);
        }
        let mut icmp = ip6(58);
        for kind in 133..=137 {
            icmp[54] = kind;
            assert_eq!(ask(&icmp), None);
        }
        icmp[54] = 128;
        assert!(ask(&icmp).is_some());
    }

    #[test]
    fn test_examine_no_address_of_its_own_is_never_a_match() {
        let nobody = Identity { mac: MAC, mtu: 1500, ..Identity::default() };
        let mut four = udp4();
        four[26..30].fill(0);
        assert_eq!(examine(&NetHeader::default(), &four, four.len(), &nobody), None);
        let mut six = ip6(17);
        six[22..38].fill(0);
        assert_eq!(examine(&NetHeader::default(), &six, six.len(), &nobody), None);
    }

    #[test]
    fn test_examine_segmentation_needs_the_receivers_consent() {
        let mut frame = udp4();
        frame[23] = PROTOCOL_TCP;
        let header = NetHeader {
            flags: 1,
            gso_type: 1,
            header_length: 54,
            gso_size: 1448,
            checksum_start: 34,
            checksum_offset: 16,
        };
        let needs = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
        let datagram = examine(&header, &frame, frame.len(), &sender()).unwrap();
        assert_eq!(datagram.needs, needs);
        for wrong in [
            NetHeader { flags: 0, ..header },
            NetHeader { gso_type: 4, ..header },
            NetHeader { gso_type: 3, ..header },
            NetHeader { gso_size: 0, ..header },
            NetHeader { checksum_start: 38, ..header },
            NetHeader { checksum_offset: 6, ..header },
            NetHeader { header_length: 61, ..header },
        ] {
            assert_eq!(examine(&wrong, &frame, frame.len(), &sender()), None, "{wrong:?}");
        }
    }

    #[test]
    fn test_examine_checksum_outside_the_frame_is_left_to_the_kernel() {
        let frame = udp4();
        let header = NetHeader { flags: 1, checksum_start: 34, checksum_offset: 6, ..NetHeader::default() };
        assert!(examine(&header, &frame, frame.len(), &sender()).is_some());
        for (checksum_start, checksum_offset) in [(33, 6), (34, 25), (65535, 65535)] {
            let wrong = NetHeader { checksum_start, checksum_offset, ..header };
            assert_eq!(examine(&wrong, &frame, frame.len(), &sender()), None);
        }
    }

    #[test]
    fn test_header_survives_writing_and_parsing() {
        let header = NetHeader {
            flags: 1,
            gso_type: 0x81,
            header_length: 54,
            gso_size: 1448,
            checksum_start: 34,
            checksum_offset: 16,
        };
        let (first, second) = header.words();
        let bytes = [&first.to_le_bytes()[..], &second.to_le_bytes()].concat();
        assert_eq!(NetHeader::parse(bytes.first_chunk().unwrap()), header);
        assert_eq!(header.forwarded(), header.words());
        assert_eq!(NetHeader { flags: 2, ..NetHeader::default() }.forwarded(), (0, 0));
    }

    proptest! {
        #[test]
        fn test_examine_any_bytes_never_panics(
            header in any::<[u8; LEGACY_NET_HEADER]>(),
            mut head in proptest::collection::vec(any::<u8>(), 0..128),
            more in 0_usize..70000,
            own in any::<bool>(),
            ethertype in prop_oneof![Just([8_u8, 0]), Just([0x86, 0xdd]), any::<[u8; 2]>()],
        ) {
            if own && head.len() >= 14 {
                head[6..12].copy_from_slice(&MAC);
                head[12..14].copy_from_slice(&ethertype);
            }
            let length = if head.len() < EXAMINED { head.len() } else { head.len() + more };
            let _ = examine(&NetHeader::parse(&header), &head, length, &sender());
        }

        #[test]
        fn test_examine_what_passes_is_the_senders_own(
            mut frame in proptest::collection::vec(any::<u8>(), 54..128),
            version in prop_oneof![Just((0x0800_u16, 0x45_u8)), Just((0x86dd, 0x60))],
        ) {
            frame[12..14].copy_from_slice(&version.0.to_be_bytes());
            frame[14] = version.1;
            prop_assume!(frame[6..12] != MAC);
            prop_assert_eq!(ask(&frame), None);
            frame[6..12].copy_from_slice(&MAC);
            if ask(&frame).is_some() {
                let own = if version.0 == 0x0800 {
                    frame[26..30] == 0x0a0a_0001_u32.to_be_bytes()
                } else {
                    frame[22..38] == (0xfd10_u128 << 112 | 1).to_be_bytes()
                        || frame[22..38] == (0xfe80_u128 << 112 | 1).to_be_bytes()
                };
                prop_assert!(own);
            }
        }
    }
}
