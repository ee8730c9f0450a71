// SPDX-License-Identifier: Apache-2.0

//! The daemon end to end: control protocol, vhost-user, and frames from one guest to another.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};

use common::*;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde_json::json;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

fn two_guests() -> (Daemon, Guest, Guest) {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2)];
    daemon.apply(&ports);
    let (one, two) = (Guest::connected(&daemon, 1), Guest::connected(&daemon, 2));
    (daemon, one, two)
}

#[test]
fn test_frame_arrives_with_the_receivers_mac_and_is_counted() {
    let (mut daemon, mut one, mut two) = two_guests();
    for length in [60, 115, 116, 117, 1000, 1514] {
        let sent = frame(1, 2, length, 7);
        one.send(&sent);
        let (header, received) = two.receive();
        assert_eq!(received, delivered(&sent, 2));
        assert_eq!(header, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(one.wait_used(1).1, 0);
    }
    let bytes = 60 + 115 + 116 + 117 + 1000 + 1514;
    let stats = daemon.ask(&json!({"op": "stats"}));
    let (p1, p2) = (&stats["ports"]["p1"], &stats["ports"]["p2"]);
    assert_eq!((&p1["tx_packets"], &p1["tx_bytes"], &p1["rx_packets"]), (&json!(6), &json!(bytes), &json!(0)));
    assert_eq!((&p2["rx_packets"], &p2["rx_bytes"], &p2["tx_packets"]), (&json!(6), &json!(bytes), &json!(0)));
    assert_eq!((&p1["connected"], &p1["queues"], &p1["failed"]), (&json!(true), &json!(1), &json!(null)));
    let pair = &stats["pairs"][0];
    assert_eq!(pair["from"], "02:00:00:00:00:01");
    assert_eq!(pair["to"], "02:00:00:00:00:02");
    assert_eq!((&pair["packets"], &pair["bytes"]), (&json!(6), &json!(bytes)));
    assert!(p1["last_seen_ns"].as_u64() > Some(0) && pair["last_seen_ns"].as_u64() > Some(0));
}

#[test]
fn test_frame_in_many_buffers_arrives_whole() {
    let (_daemon, mut one, mut two) = two_guests();
    let mut sent = frame(1, 2, 1514, 0);
    for (at, byte) in sent.iter_mut().enumerate().skip(34) {
        *byte = at as u8;
    }
    for cuts in [&[12][..], &[5, 12, 13], &[10, 30, 100, 127, 128, 129, 1500], &[1, 2, 3, 4, 5, 6, 7, 8, 9]] {
        one.send_with(1, &[0; 12], &sent, cuts);
        assert_eq!(two.receive().1, delivered(&sent, 2));
    }
}

#[test]
fn test_both_families_and_link_local_arrive() {
    let (_daemon, mut one, mut two) = two_guests();
    let six = frame6(1, 2, 100, 17, 1);
    one.send(&six);
    assert_eq!(two.receive().1, delivered(&six, 2));
    let mut local = frame6(1, 2, 100, 58, 2);
    local[54] = 128;
    for at in [22, 38] {
        local[at..at + 2].copy_from_slice(&[0xfe, 0x80]);
    }
    one.send(&local);
    assert_eq!(two.receive().1, delivered(&local, 2));
}

#[test]
fn test_anything_else_is_left_to_the_tap() {
    let (mut daemon, mut one, mut two) = two_guests();
    let mut others = Vec::new();
    let mut change = |action: &dyn Fn(&mut Vec<u8>)| {
        let mut other = frame(1, 2, 100, 0);
        action(&mut other);
        others.push(other);
    };
    change(&|f| f[..6].fill(0xff));
    change(&|f| f[11] = 2);
    change(&|f| f[29] = 2);
    change(&|f| f[33] = 9);
    change(&|f| f[33] = 1);
    change(&|f| f[20] = 0x20);
    change(&|f| f[12..14].copy_from_slice(&[8, 6]));
    change(&|f| f[12..14].copy_from_slice(&[0x81, 0]));
    others.push(frame6(1, 2, 100, 44, 0));
    let mut discovery = frame6(1, 2, 100, 58, 0);
    discovery[54] = 135;
    others.push(discovery);
    for (count, other) in others.iter().enumerate() {
        one.send(other);
        daemon.wait_for(1, "slow_packets", count as u64 + 1);
    }
    assert!(!two.has_received());
    let last = frame(1, 2, 100, 5);
    one.send(&last);
    assert_eq!(two.receive().1, delivered(&last, 2));
    assert_eq!(daemon.stat(1, "tx_packets"), 1);
}

#[test]
fn test_policy_changes_while_frames_flow() {
    let (mut daemon, mut one, mut two) = two_guests();
    let (p1, p2) = (daemon.port(1), daemon.port(2));
    let mut slow = 0;
    let refusals = [
        (with(&p1, "slow", true), p2.clone()),
        (p1.clone(), with(&p2, "slow", true)),
        (with(&p1, "vlan", 5), p2.clone()),
        (with(&p1, "isolated", true), with(&p2, "isolated", true)),
        (with(&p1, "group", 1), with(&p2, "group", 2)),
        (p1.clone(), with(&p2, "net", 8)),
        (with(&p1, "ipv4", "10.0.0.7"), p2.clone()),
        (with(&p1, "mac", "02:00:00:00:00:07"), p2.clone()),
        (with(&p1, "mtu", 80), p2.clone()),
    ];
    for (number, (other1, other2)) in refusals.into_iter().enumerate() {
        daemon.apply(&[other1, other2]);
        one.send(&frame(1, 2, 100, 0));
        slow += 1;
        daemon.wait_for(1, "slow_packets", slow);
        daemon.apply(&[p1.clone(), p2.clone()]);
        let sent = frame(1, 2, 100, number as u8);
        one.send(&sent);
        assert_eq!(two.receive().1, delivered(&sent, 2), "after case {number}");
    }
    daemon.apply(&[with(&p1, "group", 1), with(&p2, "group", 1)]);
    one.send(&frame(1, 2, 100, 9));
    two.receive();
}

#[test]
fn test_large_segment_is_merged_into_small_buffers() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2), daemon.port(3)];
    daemon.apply(&ports);
    let offload = MODERN | CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4;
    let mut one = Guest::new(offload);
    one.connect(&daemon.path("1.sock"));
    let mut two = Guest::with_pairs(offload, 1, 64);
    two.connect(&daemon.path("2.sock"));
    two.fill();
    let _three = Guest::connected(&daemon, 3);
    let mut header = [0; 12];
    header[..10].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0]);
    for length in [1600, 30000, 65535 + 14] {
        let mut sent = frame(1, 2, length, 0);
        sent[23] = 6;
        for (at, byte) in sent.iter_mut().enumerate().skip(34) {
            *byte = (at % 251) as u8;
        }
        one.send_large(&header, &sent);
        let (received_header, received) = two.receive();
        assert_eq!(received_header[..10], header[..10]);
        let buffers = (length + 12).div_ceil(BUFFER as usize) as u16;
        assert_eq!(received_header[10..], buffers.to_le_bytes());
        assert_eq!(received, delivered(&sent, 2));
        one.wait_used(1);
    }
    // A guest that has not asked for segments gets them by way of the kernel, which makes frames of them.
    let mut sent = frame(1, 3, 3000, 0);
    sent[23] = 6;
    one.send_large(&header, &sent);
    daemon.wait_for(1, "slow_packets", 1);
}

#[test]
fn test_legacy_headers_and_flags_without_event_index() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2)];
    daemon.apply(&ports);
    for (features1, features2) in [(0, MODERN), (MODERN, 0), (0, 0), (VERSION_1, VERSION_1 | PROTOCOL_FEATURES)] {
        let mut one = Guest::new(features1 | INDIRECT_DESC);
        one.connect(&daemon.path("1.sock"));
        let mut two = Guest::new(features2);
        two.connect(&daemon.path("2.sock"));
        two.fill();
        // Without protocol features nothing says when the daemon has understood.
        daemon.wait_for(1, "queues", 1);
        daemon.wait_for(2, "queues", 1);
        for length in [60, 1514] {
            let sent = frame(1, 2, length, 7);
            one.send_with(1, &[0; 12], &sent, &[4, 11, 200]);
            let (header, received) = two.receive();
            assert_eq!(received, delivered(&sent, 2));
            assert_eq!(header.len(), two.header());
            one.wait_used(1);
        }
        drop((one, two));
        for number in [1, 2] {
            eventually("the disconnection", || (daemon.stats(number)["connected"] == false).then_some(()));
        }
    }
}

#[test]
fn test_receiver_without_buffers_loses_frames_but_not_the_sender() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2), daemon.port(3)];
    daemon.apply(&ports);
    let mut one = Guest::connected(&daemon, 1);
    let mut two = Guest::new(MODERN);
    two.connect(&daemon.path("2.sock"));
    two.offer_buffers(0, 2);
    let mut three = Guest::connected(&daemon, 3);
    for mark in 0..5 {
        one.send(&frame(1, 2, 100, mark));
    }
    let sent = frame(1, 3, 100, 9);
    one.send(&sent);
    assert_eq!(three.receive().1, delivered(&sent, 3));
    daemon.wait_for(2, "dropped_full", 3);
    for mark in 0..2 {
        assert_eq!(two.receive().1[50], mark);
    }
    one.send(&frame(1, 2, 100, 7));
    assert_eq!(two.receive().1[50], 7);
}

#[test]
fn test_guest_that_is_not_there_loses_its_frames() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2)];
    daemon.apply(&ports);
    let mut one = Guest::connected(&daemon, 1);
    one.send(&frame(1, 2, 100, 0));
    daemon.wait_for(2, "dropped_full", 1);
    assert_eq!(daemon.stat(1, "slow_packets"), 0);
    let mut two = Guest::connected(&daemon, 2);
    one.send(&frame(1, 2, 100, 1));
    assert_eq!(two.receive().1[50], 1);
}

#[test]
fn test_frame_of_impossible_length_is_dropped() {
    let (mut daemon, mut one, mut two) = two_guests();
    one.send(&[0; 13]);
    daemon.wait_for(1, "dropped_malformed", 1);
    one.send_large(&[0; 12], &vec![0; 65535 + 14 + 5]);
    daemon.wait_for(1, "dropped_malformed", 2);
    one.send(&frame(1, 2, 100, 1));
    assert_eq!(two.receive().1[50], 1);
}

#[test]
fn test_malformed_ring_fails_its_own_device_alone() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2), daemon.port(3)];
    daemon.apply(&ports);
    let mut one = Guest::connected(&daemon, 1);
    let mut two = Guest::connected(&daemon, 2);
    type Harm = fn(&mut Guest);
    let send_harms: [(Harm, &str); 8] = [
        (|guest| guest.put(1, 0, 0x20_0000, 0, 0, 0), "no bytes"),
        (|guest| guest.put(1, 0, 0x20_0000, 100, 2, 0), "direction"),
        (|guest| guest.put(1, 0, MEMORY - 10, 100, 0, 0), "outside"),
        (|guest| guest.put(1, 0, 0x20_0000, 100, 1, 0), "more than 16"),
        (|guest| guest.put(1, 0, 0x20_0000, 100, 1, 16), "descriptor 16"),
        (|guest| guest.put(1, 0, 0x20_0000, 17, 4, 0), "indirect"),
        (|guest| guest.put(1, 0, 0x20_0000, 11, 0, 0), "virtio_net_hdr"),
        (|guest| guest.queues[1].avail = 40, "available index"),
    ];
    for (harm, why) in send_harms {
        let mut three = Guest::connected(&daemon, 3);
        harm(&mut three);
        three.offer(1, 0);
        three.kick(1);
        let failure = daemon.wait_for_failure(3);
        assert!(failure.contains(why), "{failure}");
        assert_eq!(daemon.stats(3)["queues"], 0);
        one.send(&frame(1, 2, 100, 3));
        assert_eq!(two.receive().1[50], 3);
        drop(three);
        eventually("the disconnection", || (daemon.stats(3)["connected"] == false).then_some(()));
    }
    let receive_harms: [(Harm, &str); 3] = [
        (|guest| guest.put(0, 0, 0x20_0000, 2048, 0, 0), "direction"),
        (|guest| guest.put(0, 0, u64::MAX - 3, 2048, 2, 0), "outside"),
        (|guest| guest.put(0, 0, 0x20_0000, 2048, 3, 0), "more than 16"),
    ];
    for (harm, why) in receive_harms {
        let mut three = Guest::connected(&daemon, 3);
        harm(&mut three);
        one.send(&frame(1, 3, 100, 3));
        let failure = daemon.wait_for_failure(3);
        assert!(failure.contains(why), "{failure}");
        assert_eq!(daemon.stats(1)["failed"], json!(null));
        // The guest starts anew: it is served again.
        let mut three_again = Guest::new(MODERN);
        drop(three);
        three_again.connect(&daemon.path("3.sock"));
        three_again.fill();
        one.send(&frame(1, 3, 100, 4));
        assert_eq!(three_again.receive().1[50], 4);
        drop(three_again);
        eventually("the disconnection", || (daemon.stats(3)["connected"] == false).then_some(()));
    }
    assert!(daemon.is_running());
}

#[test]
fn test_driver_that_is_reset_on_one_connection_is_served_again() {
    let (mut daemon, mut one, mut two) = two_guests();
    one.send(&frame(1, 2, 100, 1));
    two.receive();
    one.wait_used(1);
    assert_eq!(one.stop(1), 1);
    assert_eq!(one.stop(0), 0);
    one.send(&frame(1, 2, 100, 2));
    assert_eq!(daemon.stat(1, "queues"), 0);
    assert!(!two.has_received());
    // Another driver, with other features and empty rings.
    one.features = VERSION_1 | PROTOCOL_FEATURES;
    one.frontend().set_features(VERSION_1 | PROTOCOL_FEATURES).unwrap();
    for index in 0..2 {
        let queue = &mut one.queues[index];
        (queue.avail, queue.used) = (0, 0);
        let (available, used) = (queue.available(), queue.used_ring());
        one.write(available, [0_u16; 2]);
        one.write(used, [0_u16; 2]);
        one.start(index);
    }
    one.send(&frame(1, 2, 100, 3));
    assert_eq!(two.receive().1[50], 3);
}

#[test]
fn test_frames_go_on_after_the_daemon_was_killed() {
    let (mut daemon, mut one, mut two) = two_guests();
    let ports = [daemon.port(1), daemon.port(2)];
    for mark in 0..20 {
        one.send(&frame(1, 2, 100, mark));
        assert_eq!(two.receive().1[50], mark);
        one.wait_used(1);
    }
    daemon.kill_and_restart();
    one.disconnect();
    two.disconnect();
    // Sent while nobody is there.
    one.send(&frame(1, 2, 100, 77));
    daemon.apply(&ports);
    two.connect(&daemon.path("2.sock"));
    one.connect(&daemon.path("1.sock"));
    assert_eq!(two.receive().1[50], 77);
    one.send(&frame(1, 2, 100, 78));
    assert_eq!(two.receive().1[50], 78);
}

#[test]
fn test_apply_again_changes_nothing_and_leaving_out_closes() {
    let (mut daemon, mut one, mut two) = two_guests();
    let ports = [daemon.port(1), daemon.port(2)];
    let file = |path| std::fs::metadata(path).map(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata)).ok();
    let before = file(daemon.path("1.sock"));
    assert!(before.is_some());
    for mark in 0..10 {
        daemon.apply(&ports);
        one.send(&frame(1, 2, 100, mark));
        assert_eq!(two.receive().1[50], mark);
    }
    assert_eq!(file(daemon.path("1.sock")), before);
    daemon.apply(&ports[..1]);
    assert!(!daemon.path("2.sock").exists());
    assert!(two.frontend().get_features().is_err());
    one.send(&frame(1, 2, 100, 0));
    daemon.wait_for(1, "slow_packets", 1);
    assert_eq!(daemon.stats(2), json!(null));
    daemon.apply(&ports);
    two = Guest::connected(&daemon, 2);
    one.send(&frame(1, 2, 100, 42));
    assert_eq!(two.receive().1[50], 42);
}

#[test]
fn test_sockets_that_the_parent_has_bound_are_used() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2)];
    let sockets = [1, 2].map(|n| UnixListener::bind(daemon.path(&format!("{n}.sock"))).unwrap());
    // A VMM that is there before the daemon knows of its port.
    let socket = daemon.path("1.sock");
    let early = std::thread::spawn(move || {
        let mut guest = Guest::new(MODERN);
        guest.connect(&socket);
        guest.fill();
        guest
    });
    let request = json!({"op": "apply", "ports": ports, "socket_fds": ["p2", "p1"]}).to_string() + "\n";
    let (first, rest) = request.as_bytes().split_at(20);
    daemon.send_with_files(first, &[sockets[1].as_raw_fd()]);
    daemon.send_with_files(rest, &[sockets[0].as_raw_fd()]);
    assert_eq!(daemon.answer(), json!({"ok": true}));
    drop(sockets);
    let mut one = early.join().unwrap();
    let mut two = Guest::connected(&daemon, 2);
    one.send(&frame(1, 2, 100, 1));
    assert_eq!(two.receive().1[50], 1);
    // Fewer files than names, and files that nobody has asked for.
    let more = json!({"op": "apply", "ports": ports, "socket_fds": ["p1"]});
    assert_eq!(daemon.ask(&more)["ok"], false);
    let listener = UnixListener::bind(daemon.path("stray")).unwrap();
    daemon.send_with_files(b"{\"op\": \"ping\"}\n", &[listener.as_raw_fd()]);
    assert_eq!(daemon.answer()["ok"], true);
    assert_eq!(daemon.ask(&more)["ok"], false);
    one.send(&frame(1, 2, 100, 2));
    assert_eq!(two.receive().1[50], 2);
}

#[test]
fn test_control_nonsense_is_refused_and_the_connection_stays() {
    let mut daemon = Daemon::start();
    for nonsense in
        ["{}", "[]", "{\"op\": \"dance\"}", "{\"op\": \"ping\", \"x\": 1}", "", "\u{0}", "{\"op\": \"apply\"}"]
    {
        daemon.send(format!("{nonsense}\n").as_bytes());
        let answer = daemon.answer();
        assert_eq!(answer["ok"], false, "{nonsense}");
        assert!(answer["error"].is_string());
    }
    let answer = daemon.ask(&json!({"op": "ping"}));
    assert_eq!((&answer["ok"], &answer["pid"]), (&json!(true), &json!(daemon.pid())));
    let twice = [daemon.port(1), daemon.port(1)];
    assert_eq!(daemon.ask(&json!({"op": "apply", "ports": twice}))["ok"], false);
    // One that cannot be made does not keep the others from being made.
    let some = [with(&daemon.port(1), "tap", "no-such-tap"), daemon.port(2)];
    let answer = daemon.ask(&json!({"op": "apply", "ports": some}));
    assert!(answer["error"].as_str().unwrap().contains("no-such-tap"), "{answer}");
    assert!(daemon.path("2.sock").exists() && !daemon.path("1.sock").exists());
    daemon.connect();
    assert_eq!(daemon.ask(&json!({"op": "ping"}))["ok"], true);
}

#[test]
fn test_control_line_that_is_too_long_ends_the_connection_only() {
    let mut daemon = Daemon::start();
    let chunk = vec![b'x'; 1 << 20];
    for _ in 0..16 {
        daemon.send(&chunk);
    }
    daemon.send(b"x");
    assert_eq!(daemon.answer()["ok"], false);
    daemon.connect();
    assert_eq!(daemon.ask(&json!({"op": "ping"}))["ok"], true);
}

#[test]
fn test_vmm_nonsense_ends_its_connection_only() {
    let (mut daemon, mut one, mut two) = two_guests();
    let ports = [daemon.port(1), daemon.port(2), daemon.port(3)];
    daemon.apply(&ports);
    for nonsense in [&[0xff; 64][..], &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0xff], &[0; 5]] {
        let mut vmm = UnixStream::connect(daemon.path("3.sock")).unwrap();
        vmm.write_all(nonsense).unwrap();
        one.send(&frame(1, 2, 100, 1));
        assert_eq!(two.receive().1[50], 1);
    }
    // Half a message, and then nothing more.
    let mut vmm = UnixStream::connect(daemon.path("3.sock")).unwrap();
    vmm.write_all(&[1, 0, 0]).unwrap();
    daemon.apply(&ports[..2]);
    one.send(&frame(1, 2, 100, 2));
    assert_eq!(two.receive().1[50], 2);
}

#[test]
fn test_second_vmm_waits_for_the_first_to_go() {
    let (daemon, one, mut two) = two_guests();
    let socket = daemon.path("1.sock");
    let next = std::thread::spawn(move || {
        let mut guest = Guest::new(MODERN);
        guest.connect(&socket);
        guest
    });
    drop(one);
    let mut one = next.join().unwrap();
    one.send(&frame(1, 2, 100, 1));
    assert_eq!(two.receive().1[50], 1);
}

#[test]
fn test_memory_comes_and_goes_while_frames_flow() {
    let (mut daemon, mut one, mut two) = two_guests();
    for mark in 0..10 {
        let plugged = one.region(0, 0x1000);
        let plugged = vhost::VhostUserMemoryRegionInfo { guest_phys_addr: 1 << 32, ..plugged };
        one.frontend().add_mem_region(&plugged).unwrap();
        one.send(&frame(1, 2, 100, mark));
        assert_eq!(two.receive().1[50], mark);
        one.frontend().remove_mem_region(&plugged).unwrap();
        let whole = one.region(0, MEMORY);
        one.frontend().set_mem_table(&[whole]).unwrap();
        one.send(&frame(1, 2, 100, mark + 100));
        assert_eq!(two.receive().1[50], mark + 100);
        one.wait_used(1);
        one.wait_used(1);
    }
    // Without the memory that its rings are in, the guest is not served, and nothing worse.
    let whole = one.region(0, MEMORY);
    one.frontend().remove_mem_region(&whole).unwrap();
    assert_eq!(daemon.stat(1, "queues"), 0);
    assert!(daemon.is_running());
}

#[test]
fn test_memory_that_is_taken_away_fails_its_own_device_alone() {
    let (mut daemon, mut one, mut two) = two_guests();
    let ports = [daemon.port(1), daemon.port(2), daemon.port(3)];
    daemon.apply(&ports);
    let three = Guest::connected(&daemon, 3);
    one.send(&frame(1, 3, 100, 1));
    daemon.wait_for(3, "rx_packets", 1);
    let file = three.file.try_clone().unwrap();
    // Our own mapping must not be touched any more.
    let kick = share(&three.queues[1].kick);
    file.set_len(0).unwrap();
    nix::unistd::write(&kick, &1_u64.to_ne_bytes()).unwrap();
    for _ in 0..3 {
        one.send(&frame(1, 3, 100, 2));
    }
    one.send(&frame(1, 2, 100, 3));
    assert_eq!(two.receive().1[50], 3);
    assert!(daemon.is_running());
}

#[test]
fn test_queue_pairs_keep_flows_apart() {
    let mut daemon = Daemon::start();
    let ports = [with(&daemon.port(1), "queues", 2), with(&daemon.port(2), "queues", 2)];
    daemon.apply(&ports);
    let mut one = Guest::with_pairs(MODERN, 2, 16);
    one.connect(&daemon.path("1.sock"));
    let mut two = Guest::with_pairs(MODERN, 2, 16);
    two.connect(&daemon.path("2.sock"));
    two.fill();
    one.send_with(1, &[0; 12], &frame(1, 2, 100, 1), &[]);
    assert_eq!(two.receive_in(0).1[50], 1);
    one.send_with(3, &[0; 12], &frame(1, 2, 100, 2), &[]);
    assert_eq!(two.receive_in(2).1[50], 2);
    assert_eq!(daemon.stat(2, "queues"), 2);
    // The guest uses one pair only.
    for index in [2, 3] {
        two.frontend().set_vring_enable(index, false).unwrap();
    }
    one.send_with(3, &[0; 12], &frame(1, 2, 100, 3), &[]);
    assert_eq!(two.receive_in(0).1[50], 3);
    // What is sent in a queue that is not enabled is thrown away.
    one.frontend().set_vring_enable(3, false).unwrap();
    one.send_with(3, &[0; 12], &frame(1, 2, 100, 4), &[]);
    for _ in 0..3 {
        one.wait_used(3);
    }
    one.send_with(1, &[0; 12], &frame(1, 2, 100, 5), &[]);
    assert_eq!(two.receive_in(0).1[50], 5);
    // Fewer pairs from now on: the VMM is told when it connects again.
    daemon.apply(&[daemon.port(1), daemon.port(2)]);
    assert!(two.frontend().get_features().is_err());
    let mut frontend = vhost::vhost_user::Frontend::connect(daemon.path("2.sock"), 2).unwrap();
    frontend.get_features().unwrap();
    frontend.set_features(PROTOCOL_FEATURES).unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), 1);
}

#[test]
fn test_rings_that_are_enabled_before_the_features_work() {
    let mut daemon = Daemon::start();
    let ports = [daemon.port(1), daemon.port(2)];
    daemon.apply(&ports);
    let mut guests = [1, 2].map(|number: u8| {
        let mut guest = Guest::new(MODERN);
        let mut stream = UnixStream::connect(daemon.path(&format!("{number}.sock"))).unwrap();
        for (index, flags) in [(0_u32, 1_u32), (1, 9)] {
            for word in [18, flags, 8, index, 1] {
                stream.write_all(&word.to_ne_bytes()).unwrap();
            }
        }
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [18, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        guest.greet_on(vhost::vhost_user::Frontend::from_stream(stream, 2));
        for index in 0..2 {
            guest.start_without_enabling(index);
        }
        guest.fill();
        guest
    });
    guests[0].send(&frame(1, 2, 100, 1));
    assert_eq!(guests[1].receive().1[50], 1);
}

#[test]
fn test_pages_that_are_written_are_logged_while_the_guest_migrates() {
    let (mut daemon, mut one, mut two) = two_guests();
    let log = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC).unwrap());
    log.set_len(0x1000).unwrap();
    let dirty = |page: u64| {
        let mut byte = [0];
        log.read_exact_at(&mut byte, page / 8).unwrap();
        byte[0] >> (page % 8) & 1 == 1
    };
    let region = vhost::VhostUserDirtyLogRegion { mmap_size: 0x1000, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    two.frontend().set_log_base(0, Some(region)).unwrap();
    one.send(&frame(1, 2, 100, 1));
    two.receive();
    assert!((0..1024).all(|page| !dirty(page)));
    two.frontend().set_features(MODERN | LOG_ALL).unwrap();
    two.log_used_rings();
    let (buffer, used) = (two.next_buffer(0), two.queues[0].used_ring());
    one.send(&frame(1, 2, 100, 1));
    two.receive();
    for page in 0..1024 {
        let expected = page == buffer / 4096 || page == used / 4096;
        assert_eq!(dirty(page), expected, "page {page}");
    }
    assert_ne!(buffer / 4096, used / 4096);
    // It has not migrated after all.
    two.frontend().set_features(MODERN).unwrap();
    log.set_len(0).unwrap();
    log.set_len(0x1000).unwrap();
    one.send(&frame(1, 2, 100, 1));
    two.receive();
    assert!((0..1024).all(|page| !dirty(page)));
    assert!(daemon.is_running());
}

#[test]
fn test_bursts_arrive_complete_and_in_order() {
    let (mut daemon, mut one, mut two) = two_guests();
    let mut sent = 0_u32;
    let mut completed = 0;
    let mut expected = 0_u32;
    while expected < 5000 {
        while sent < 5000 && sent - completed < 16 {
            let mut next = frame(1, 2, 200, 0);
            next[40..44].copy_from_slice(&sent.to_le_bytes());
            one.send(&next);
            sent += 1;
        }
        let (_, received) = two.receive();
        assert_eq!(received[40..44], expected.to_le_bytes());
        expected += 1;
        one.wait_used(1);
        completed += 1;
    }
    assert_eq!(daemon.stat(2, "dropped_full"), 0);
}

#[test]
fn test_signal_removes_the_sockets() {
    let (mut daemon, mut one, _two) = two_guests();
    assert_eq!(daemon.terminate(), Some(0));
    assert!(!daemon.path("1.sock").exists() && !daemon.path("2.sock").exists());
    assert!(one.frontend().get_features().is_err());
}
