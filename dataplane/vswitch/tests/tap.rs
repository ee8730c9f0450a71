// SPDX-License-Identifier: Apache-2.0

//! Ports with taps, in a network namespace of the test's own. Where it may not make one, the tests do nothing.

mod common;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use common::*;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

mod request {
    nix::ioctl_write_int!(tunsetiff, b'T', 202);
    nix::ioctl_write_int!(tunsetpersist, b'T', 203);
}

#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

/// A tap that the control plane has made, and what the kernel's switch would see of it.
struct Link {
    name: &'static str,
    packets: OwnedFd,
}

/// Enter a network namespace; the threads and processes that this thread starts are in it too.
fn enter_namespace() -> bool {
    let entered = unshare(CloneFlags::CLONE_NEWNET).is_ok();
    if !entered {
        eprintln!("no network namespace can be made here: nothing is tested");
    }
    entered
}

impl Link {
    fn new(name: &'static str) -> Self {
        let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        Self::configure(&tap, name);
        // SAFETY: the request takes a number.
        unsafe { request::tunsetpersist(tap.as_raw_fd(), 1) }.unwrap();
        drop(tap);
        let index = nix::net::if_::if_nametoindex(name).unwrap();
        // SAFETY: a new socket, whose descriptor is nobody else's.
        let packets = unsafe {
            let socket = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
            assert!(socket >= 0);
            OwnedFd::from_raw_fd(socket)
        };
        // IPv6 of the namespace itself would send frames of its own.
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1").unwrap();
        let mut request = Request { name: [0; 16], flags: (libc::IFF_UP | libc::IFF_NOARP) as i16, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let address = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
            sll_ifindex: index as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        // SAFETY: both calls read the structs that they are given.
        unsafe {
            assert_eq!(libc::ioctl(packets.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request), 0);
            let size = size_of::<libc::sockaddr_ll>() as u32;
            assert_eq!(libc::bind(packets.as_raw_fd(), (&raw const address).cast(), size), 0);
        }
        Link { name, packets }
    }

    fn configure(tap: &File, name: &str) {
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
        let mut request = Request { name: [0; 16], flags, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        // SAFETY: the request reads the struct that it is given.
        unsafe { request::tunsetiff(tap.as_raw_fd(), &raw const request as libc::c_ulong) }.unwrap();
    }

    /// What comes by the tap next, except that the guest is announced.
    fn next(&self) -> Vec<u8> {
        loop {
            let bytes = self.next_of_all();
            if bytes[12..14] != [0x80, 0x35] {
                return bytes;
            }
        }
    }

    fn next_of_all(&self) -> Vec<u8> {
        let mut files = [PollFd::new(self.packets.as_fd(), PollFlags::POLLIN)];
        let count = poll(&mut files, PollTimeout::try_from(PATIENCE).unwrap()).unwrap();
        assert_eq!(count, 1, "nothing comes to {}", self.name);
        let mut bytes = vec![0; 70000];
        let length = nix::unistd::read(&self.packets, &mut bytes).unwrap();
        bytes.truncate(length);
        bytes
    }

    /// What the kernel's switch would send to the guest.
    fn send(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.packets, frame).unwrap(), frame.len());
    }
}

fn tapped(daemon: &Daemon, number: u8) -> serde_json::Value {
    with(&daemon.port(number), "tap", format!("tap{number}"))
}

#[test]
fn test_tap_carries_what_does_not_take_the_short_cut() {
    if !enter_namespace() {
        return;
    }
    let (link1, link2) = (Link::new("tap1"), Link::new("tap2"));
    let mut daemon = Daemon::start();
    let ports = [tapped(&daemon, 1), tapped(&daemon, 2)];
    daemon.apply(&ports);
    let mut one = Guest::connected(&daemon, 1);
    let mut two = Guest::connected(&daemon, 2);
    // That the guest is there from now on.
    let announcement = link1.next_of_all();
    assert_eq!(announcement[..22], [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1, 0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]].concat());
    // Unchanged, even if it is spoofed: the kernel's switch drops and counts that.
    let mut sent = frame(1, 2, 300, 1);
    sent[11] = 9;
    for cuts in [&[][..], &[3, 12, 13, 100, 200]] {
        one.send_with(1, &[0; 12], &sent, cuts);
        assert_eq!(link1.next(), sent);
    }
    let mut request = frame(1, 2, 60, 2);
    request[..6].fill(0xff);
    request[12..14].copy_from_slice(&[8, 6]);
    one.send(&request);
    assert_eq!(link1.next(), request);
    // The other way, and past the short cut.
    for length in [60, 1514] {
        let back = frame(9, 1, length, 3);
        link1.send(&back);
        assert_eq!(one.receive().1, back);
    }
    let fast = frame(1, 2, 200, 4);
    one.send(&fast);
    assert_eq!(two.receive().1, delivered(&fast, 2));
    assert_eq!(daemon.stat(1, "slow_packets"), 3);
    assert_eq!(daemon.stat(1, "from_tap_packets"), 2);
    // The short cut goes past the taps.
    two.send(&frame(2, 9, 60, 5));
    assert_eq!(link2.next()[50], 5);
    one.send(&frame(1, 9, 60, 6));
    assert_eq!(link1.next()[50], 6);
}

#[test]
fn test_tap_is_attached_again_after_the_daemon_was_killed() {
    if !enter_namespace() {
        return;
    }
    let link1 = Link::new("tap1");
    let mut daemon = Daemon::start();
    let ports = [tapped(&daemon, 1)];
    daemon.apply(&ports);
    let mut one = Guest::connected(&daemon, 1);
    daemon.kill_and_restart();
    one.disconnect();
    daemon.apply(&ports);
    one.connect(&daemon.path("1.sock"));
    one.send(&frame(1, 9, 100, 1));
    assert_eq!(link1.next()[50], 1);
    link1.send(&frame(9, 1, 100, 2));
    assert_eq!(one.receive().1[50], 2);
    // One that was removed and made again under the same name is attached again by the same wish.
    {
        let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
        daemon.apply(&[with(&ports[0], "tap", json!(null))]);
        Link::configure(&tap, "tap1");
        // SAFETY: the request takes a number.
        unsafe { request::tunsetpersist(tap.as_raw_fd(), 0) }.unwrap();
    }
    assert!(nix::net::if_::if_nametoindex("tap1").is_err());
    let answer = daemon.ask(&json!({"op": "apply", "ports": ports}));
    assert!(answer["error"].as_str().unwrap().contains("tap1"), "{answer}");
    let link1 = Link::new("tap1");
    daemon.apply(&ports);
    one.send(&frame(1, 9, 100, 3));
    assert_eq!(link1.next()[50], 3);
}

#[test]
fn test_tap_waits_for_a_guest_without_buffers() {
    if !enter_namespace() {
        return;
    }
    let link1 = Link::new("tap1");
    let mut daemon = Daemon::start();
    let ports = [tapped(&daemon, 1)];
    daemon.apply(&ports);
    let mut one = Guest::new(MODERN);
    one.connect(&daemon.path("1.sock"));
    for mark in 0..40 {
        link1.send(&frame(9, 1, 100, mark));
    }
    one.offer_buffers(0, 4);
    for mark in 0..40 {
        assert_eq!(one.receive().1[50], mark);
    }
    assert_eq!(daemon.stat(1, "dropped_full"), 0);
}
