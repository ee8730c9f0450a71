// SPDX-License-Identifier: Apache-2.0

//! What the control plane wants a port to be, and what of that can be true.

use std::collections::HashSet;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::frame::{Address, Identity};
use crate::list::Policy;
use crate::port::{MAX_PAIRS, Settings};

const MIN_MTU: u32 = 68; // RFC 791
const MAX_MTU: u32 = 65535;
const MAX_VLAN: u16 = 4094;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl FromStr for Mac {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2);
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or_else(|| format!("no MAC: {text}"))?;
        }
        if parts.next().is_some() { Err(format!("no MAC: {text}")) } else { Ok(Mac(bytes)) }
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A port, as the control plane wants it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// Its name, by which it is known from one wish to the next.
    pub name: String,
    /// Where the VMM connects.
    pub socket: PathBuf,
    /// Name of its tap; None: what does not take the short cut is dropped.
    pub tap: Option<String>,
    /// Number of its network.
    pub net: u32,
    /// Address on the network.
    pub mac: Mac,
    /// Address on the network.
    #[serde(default)]
    pub ipv4: Option<Ipv4Addr>,
    /// Address on the network.
    #[serde(default)]
    pub ipv6: Option<Ipv6Addr>,
    /// Address on the network.
    #[serde(default)]
    pub link_local: Option<Ipv6Addr>,
    /// VLAN of untagged frames; 0: none.
    #[serde(default)]
    pub vlan: u16,
    /// Group; 0: none.
    #[serde(default)]
    pub group: u32,
    /// Talks to nobody but those without a group.
    #[serde(default)]
    pub isolated: bool,
    /// Nothing takes the short cut.
    #[serde(default)]
    pub slow: bool,
    /// Bytes of the largest datagram.
    #[serde(default = "Wish::default_mtu")]
    pub mtu: u32,
    /// Queue pairs.
    #[serde(default = "Wish::default_queues")]
    pub queues: u16,
    /// Mode of the socket.
    #[serde(default = "Wish::default_mode")]
    pub socket_mode: u32,
    /// User and group of the socket.
    #[serde(default)]
    pub socket_owner: Option<(u32, u32)>,
}

impl Wish {
    fn default_mtu() -> u32 {
        1500
    }

    fn default_queues() -> u16 {
        1
    }

    fn default_mode() -> u32 {
        0o660
    }

    /// Addresses that lead to the port.
    pub fn addresses(&self) -> impl Iterator<Item = Address> {
        let four = self.ipv4.map(|ip| Address::V4(ip.to_bits()));
        let six = [self.ipv6, self.link_local].into_iter().flatten().map(|ip| Address::V6(ip.to_bits()));
        four.into_iter().chain(six)
    }

    /// What the data thread has to know.
    pub fn settings(&self) -> Settings {
        Settings {
            net: self.net,
            identity: Identity {
                mac: self.mac.0,
                ipv4: self.ipv4.map_or(0, Ipv4Addr::to_bits),
                ipv6: self.ipv6.map_or(0, Ipv6Addr::to_bits),
                link_local: self.link_local.map_or(0, Ipv6Addr::to_bits),
                mtu: self.mtu,
            },
            policy: Policy { vlan: self.vlan, group: self.group, isolated: self.isolated },
            slow: self.slow,
        }
    }

    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let wrong = |what: &str| Err(format!("port {name}: {what}"));
        if name.is_empty() {
            return Err("a port without a name".to_owned());
        }
        if self.mac.0[0] & 1 != 0 || self.mac.0 == [0; 6] {
            return wrong(&format!("{} is the MAC of no NIC", self.mac));
        }
        if self.ipv4.is_some_and(|ip| ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast()) {
            return wrong("its IPv4 address is that of no NIC");
        }
        if [self.ipv6, self.link_local].into_iter().flatten().any(|ip| ip.is_unspecified() || ip.is_multicast()) {
            return wrong("its IPv6 address is that of no NIC");
        }
        if !(MIN_MTU..=MAX_MTU).contains(&self.mtu) {
            return wrong(&format!("mtu: {} is not between {MIN_MTU} and {MAX_MTU}", self.mtu));
        }
        if !(1..=MAX_PAIRS).contains(&self.queues) {
            return wrong(&format!("queues: {} is not between 1 and {MAX_PAIRS}", self.queues));
        }
        if self.vlan > MAX_VLAN {
            return wrong(&format!("vlan: {} is more than {MAX_VLAN}", self.vlan));
        }
        if self.socket_mode > 0o777 {
            return wrong(&format!("socket_mode: {:#o} is none", self.socket_mode));
        }
        Ok(())
    }
}

/// Check that each port can be, and that no two of them want the same.
///
/// # Errors
///
/// What is wrong, and with which port.
pub fn check(ports: &[Wish]) -> Result<(), String> {
    let mut names = HashSet::new();
    let mut sockets = HashSet::new();
    let mut taps = HashSet::new();
    let mut addresses = HashSet::new();
    for port in ports {
        port.check()?;
        let name = &port.name;
        if !names.insert(name) {
            return Err(format!("port {name} is there twice"));
        }
        if !sockets.insert(&port.socket) {
            return Err(format!("port {name}: another has the socket {}", port.socket.display()));
        }
        if let Some(tap) = &port.tap
            && !taps.insert(tap)
        {
            return Err(format!("port {name}: another has the tap {tap}"));
        }
        for address in port.addresses() {
            if !addresses.insert((port.net, address)) {
                return Err(format!("port {name}: another of network {} has one of its addresses", port.net));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wish(more: &str) -> Result<Wish, serde_json::Error> {
        let text =
            format!(r#"{{"name": "a", "socket": "/a", "tap": null, "net": 7, "mac": "02:00:00:00:00:01"{more}}}"#);
        serde_json::from_str(&text)
    }

    #[test]
    fn test_wish_defaults_are_those_of_the_protocol() {
        let wish = wish("").unwrap();
        assert_eq!((wish.mtu, wish.queues, wish.socket_mode, wish.vlan), (1500, 1, 432, 0));
        assert_eq!(wish.addresses().count(), 0);
    }

    #[test]
    fn test_wish_addresses_are_all_three() {
        let wish = wish(r#", "ipv4": "10.0.0.1", "ipv6": "fd10::1", "link_local": "fe80::1""#).unwrap();
        assert_eq!(wish.addresses().count(), 3);
        assert_eq!(wish.settings().identity.ipv4, 0x0a00_0001);
    }

    #[test]
    fn test_wish_invalid_input_returns_error() {
        for more in [r#", "surprise": 1"#, r#", "ipv4": "10.0.0.256""#, r#", "queues": -1"#] {
            assert!(wish(more).is_err(), "{more}");
        }
        for more in [
            r#", "queues": 9"#,
            r#", "queues": 0"#,
            r#", "mtu": 65536"#,
            r#", "vlan": 4095"#,
            r#", "ipv4": "224.0.0.1""#,
            r#", "ipv6": "::""#,
            r#", "socket_mode": 4096"#,
        ] {
            assert!(check(&[wish(more).unwrap()]).is_err(), "{more}");
        }
    }

    #[test]
    fn test_check_two_ports_with_the_same_returns_error() {
        let one = wish(r#", "ipv4": "10.0.0.1""#).unwrap();
        let two = Wish { name: "b".to_owned(), socket: "/b".into(), ..one.clone() };
        assert!(check(&[one.clone(), two.clone()]).unwrap_err().contains("addresses"));
        let elsewhere = Wish { net: 8, ..two.clone() };
        assert!(check(&[one.clone(), elsewhere.clone()]).is_ok());
        assert!(check(&[one.clone(), Wish { name: "a".to_owned(), ..elsewhere.clone() }]).is_err());
        assert!(check(&[one.clone(), Wish { socket: "/a".into(), ..elsewhere.clone() }]).is_err());
        let tapped = Wish { tap: Some("t".to_owned()), ..one };
        assert!(check(&[tapped.clone(), Wish { tap: Some("t".to_owned()), ..elsewhere }]).is_err());
    }

    #[test]
    fn test_mac_survives_writing_and_parsing() {
        let mac: Mac = "02:0a:ff:00:10:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:0a:ff:00:10:01");
        for wrong in ["", "02:0a:ff:00:10", "02:0a:ff:00:10:01:02", "2:0a:ff:00:10:01", "0g:0a:ff:00:10:01"] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
    }
}
