// SPDX-License-Identifier: Apache-2.0

//! The list: which port has which address, per network; and who may talk to whom.
//!
//! The list is made anew for every change and handed over as a whole, so a lookup never sees half a change. Its
//! entries come from the control plane; what guests send are only the keys that are looked up, so a guest cannot make
//! the table degenerate.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::frame::Address;

/// Multiplies and folds: a few instructions for the integers that are the keys here.
#[derive(Default)]
pub struct Fold(u64);

impl Fold {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

    fn add(&mut self, value: u64) {
        let product = u128::from(self.0 ^ value) * u128::from(Self::FACTOR);
        self.0 = product as u64 ^ (product >> 64) as u64;
    }
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.add(u64::from_le_bytes(word));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.add(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.add(value);
    }

    fn write_u128(&mut self, value: u128) {
        self.add(value as u64);
        self.add((value >> 64) as u64);
    }
}

/// A hash table whose keys are integers.
pub type Table<K, V> = HashMap<K, V, BuildHasherDefault<Fold>>;

/// Addresses of ports, by network.
#[derive(Clone, Debug, Default)]
pub struct List {
    v4: Table<u64, u32>,
    v6: Table<(u32, u128), u32>,
}

impl List {
    /// Say that `address` in `net` is that of the port in `slot`.
    pub fn insert(&mut self, net: u32, address: Address, slot: u32) {
        match address {
            Address::V4(ip) => self.v4.insert(u64::from(net) << 32 | u64::from(ip), slot),
            Address::V6(ip) => self.v6.insert((net, ip), slot),
        };
    }

    /// The port that has `address` in `net`.
    #[inline]
    pub fn find(&self, net: u32, address: Address) -> Option<u32> {
        match address {
            Address::V4(ip) => self.v4.get(&(u64::from(net) << 32 | u64::from(ip))),
            Address::V6(ip) => self.v6.get(&(net, ip)),
        }
        .copied()
    }
}

/// What says who may talk to whom within a network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// VLAN of the port's untagged frames; 0: none.
    pub vlan: u16,
    /// Group; 0: none.
    pub group: u32,
    /// Talks to nobody but those without a group.
    pub isolated: bool,
}

impl Policy {
    /// As for private VLANs (RFC 5517): an isolated port talks to those without a group, one in a group also to its
    /// group. This is `may_talk` of the kernel's switch for two access ports.
    #[inline]
    pub fn may_talk(&self, to: &Policy) -> bool {
        let from_bound = self.group != 0 || self.isolated;
        let to_bound = to.group != 0 || to.isolated;
        if self.vlan != to.vlan {
            return false;
        }
        !from_bound || !to_bound || (!self.isolated && !to.isolated && self.group == to.group)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn test_find_is_by_network_and_family() {
        let mut list = List::default();
        list.insert(7, Address::V4(1), 3);
        list.insert(8, Address::V4(1), 4);
        list.insert(7, Address::V6(1), 5);
        assert_eq!(list.find(7, Address::V4(1)), Some(3));
        assert_eq!(list.find(8, Address::V4(1)), Some(4));
        assert_eq!(list.find(7, Address::V6(1)), Some(5));
        assert_eq!(list.find(9, Address::V4(1)), None);
        assert_eq!(list.find(7, Address::V4(2)), None);
    }

    #[test]
    fn test_fold_spreads_neighbouring_addresses() {
        let hash = |value: u64| {
            let mut fold = Fold::default();
            fold.write_u64(value);
            fold.finish()
        };
        let low: std::collections::HashSet<u64> = (0..256).map(|n| hash(7 << 32 | 0x0a0a_0000 | n) & 0xffff).collect();
        let high: std::collections::HashSet<u64> = (0..256).map(|n| hash(7 << 32 | 0x0a0a_0000 | n) >> 57).collect();
        assert!(low.len() > 240 && high.len() > 90, "{} {}", low.len(), high.len());
    }

    #[test]
    fn test_may_talk_is_that_of_private_vlans() {
        let free = Policy::default();
        let isolated = Policy { isolated: true, ..free };
        let one = Policy { group: 1, ..free };
        let two = Policy { group: 2, ..free };
        let tagged = Policy { vlan: 5, ..free };
        let cases = [
            (free, free, true),
            (free, isolated, true),
            (isolated, isolated, false),
            (isolated, one, false),
            (one, one, true),
            (one, two, false),
            (one, free, true),
            (free, tagged, false),
            (tagged, tagged, true),
        ];
        for (a, b, expected) in cases {
            assert_eq!(a.may_talk(&b), expected, "{a:?} {b:?}");
            assert_eq!(b.may_talk(&a), expected, "{b:?} {a:?}");
        }
    }
}
