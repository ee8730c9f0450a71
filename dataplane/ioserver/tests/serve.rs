// SPDX-License-Identifier: Apache-2.0

//! A client speaks to a server over loopback.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioserver::config::{Guest, ModuleWish, What, Wish};
use ioserver::server::Server;
use tempfile::TempDir;
use wire::{
    Assembler, Attach, Attached, Code, Control, Device, Greeting, Handles, Header, Kind, MAX_BODY, MORE, Message,
    Names, Open, Refused, SessionId,
};

const DISK: u64 = 8 << 20;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;

struct World {
    folder: TempDir,
    server: Arc<Server>,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("disk"), vec![0; DISK as usize]).unwrap();
        let world = World { folder, server: Server::new(Duration::from_micros(50)) };
        world.server.apply(world.wish()).unwrap();
        world
    }

    fn disk(&self) -> std::path::PathBuf {
        self.folder.path().join("disk")
    }

    fn wish(&self) -> Wish {
        let guest = |guest: &str| Guest { client: "alpha".into(), guest: guest.into() };
        let block = |path: &Path, read_only| What::Block { path: path.into(), read_only, serial: "s-1".into() };
        let module = |name: &str, what, guests| ModuleWish { name: name.into(), guests, what };
        Wish {
            name: "beta".into(),
            listen: "127.0.0.1:0".parse().unwrap(),
            modules: vec![
                module("data", block(&self.disk(), false), vec![guest("ann"), guest("bob")]),
                module("fixed", block(&self.disk(), true), vec![guest("ann")]),
                module("random", What::Entropy {}, vec![guest("ann")]),
            ],
        }
    }

    fn connect(&self) -> Connection {
        let mut stream = TcpStream::connect(self.server.address().unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream.write_all(&Greeting::OURS.encode()).unwrap();
        let mut greeting = [0; Greeting::SIZE];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(Greeting::decode(&greeting), Ok(Greeting::OURS));
        Connection { stream, handles: Handles::default(), assembler: Assembler::new(1024, 64 << 20), tag: 0 }
    }

    fn attach(&self, attach: &Attach) -> (Connection, Attached) {
        let mut connection = self.connect();
        match connection.ask(&Control::Attach(attach.clone())) {
            Control::Attached(attached) => {
                connection.handles = attached.handles;
                (connection, attached)
            }
            other => panic!("{other:?}"),
        }
    }

    fn refusal(&self, attach: &Attach) -> Code {
        match self.connect().ask(&Control::Attach(attach.clone())) {
            Control::Refused(Refused { code, .. }) => code,
            other => panic!("{other:?}"),
        }
    }

    fn open(&self, attach: &Attach, handles: Handles, queue: u16) -> Connection {
        let mut connection = self.connect();
        let open = Open { session: attach.session, epoch: attach.epoch, queue };
        assert_eq!(connection.ask(&Control::Open(open)), Control::Opened);
        connection.handles = handles;
        connection
    }
}

struct Connection {
    stream: TcpStream,
    handles: Handles,
    assembler: Assembler,
    tag: u64,
}

impl Connection {
    fn frame(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut head = [0; Header::SIZE];
        self.stream.read_exact(&mut head).ok()?;
        let header = Header::decode(&head).unwrap();
        let mut body = vec![0; header.length as usize];
        self.stream.read_exact(&mut body).unwrap();
        Some((header, body))
    }

    fn control(&mut self) -> Control {
        let (header, body) = self.frame().expect("a frame");
        Control::decode(header.kind, &body).unwrap()
    }

    fn ask(&mut self, control: &Control) -> Control {
        self.stream.write_all(&control.encode(self.handles)).unwrap();
        self.control()
    }

    /// Send a request; its tag.
    fn request(&mut self, given: &[u8], room: u32, settled: u64) -> u64 {
        self.tag += 1;
        self.repeat(self.tag, given, room, settled);
        self.tag
    }

    fn repeat(&mut self, tag: u64, given: &[u8], room: u32, settled: u64) {
        let header = Header { kind: Kind::Request, queue: 0, tag, room, settled, ..self.header(given.len()) };
        let mut rest = given;
        loop {
            let (part, after) = rest.split_at(rest.len().min(MAX_BODY));
            let flags = if after.is_empty() { 0 } else { MORE };
            self.stream.write_all(&Header { length: part.len() as u32, flags, ..header }.encode()).unwrap();
            self.stream.write_all(part).unwrap();
            rest = after;
            if rest.is_empty() {
                return;
            }
        }
    }

    fn header(&self, length: usize) -> Header {
        Header::control(Kind::Request, self.handles, length)
    }

    fn answer(&mut self) -> Message {
        loop {
            let (header, body) = self.frame().expect("a frame");
            assert_eq!((header.kind, header.handles), (Kind::Answer, self.handles));
            if let Some(message) = self.assembler.add(header, &body).unwrap() {
                return message;
            }
        }
    }

    fn do_block(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> Vec<u8> {
        let tag = self.request(&block(kind, sector, data), room, 0);
        let message = self.answer();
        assert_eq!((message.header.tag, message.header.code()), (tag, Ok(Code::Done)));
        message.body
    }
}

fn block(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat()
}

fn session(number: u8) -> Attach {
    let [client, guest, server, module] = ["alpha", "ann", "beta", "data"].map(str::to_owned);
    Attach {
        names: Names { client, guest, server, module },
        session: SessionId([number; 16]),
        epoch: 1,
        device: Device::Block,
        queues: 4,
        hops: 0,
        settled: Vec::new(),
    }
}

fn named(attach: Attach, guest: &str, module: &str) -> Attach {
    Attach { names: Names { guest: guest.into(), module: module.into(), ..attach.names }, ..attach }
}

#[test]
fn disk_is_read_and_written_and_the_file_has_it() {
    let world = World::new();
    let attach = session(1);
    let (_control, attached) = world.attach(&attach);
    let mut queue = world.open(&attach, attached.handles, 0);
    let data: Vec<u8> = (0..4096).map(|at| (at % 251) as u8).collect();

    assert_eq!(attached.config[..8], (DISK / 512).to_le_bytes());
    assert_eq!(queue.do_block(OUT, 16, &data, 1), [0]);
    assert_eq!(queue.do_block(FLUSH, 0, &[], 1), [0]);
    assert_eq!(queue.do_block(IN, 16, &[], 4097), [&data[..], &[0]].concat());
    assert_eq!(&queue.do_block(GET_ID, 0, &[], 21)[..4], b"s-1\0");
    assert_eq!(fs::read(world.disk()).unwrap()[16 * 512..][..4096], data);

    let range = [&16_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &[0; 4]].concat();
    assert_eq!(queue.do_block(DISCARD, 0, &range, 1), [0]);
    assert_eq!(queue.do_block(IN, 16, &[], 4097), vec![0; 4097]);
}

#[test]
fn what_is_not_on_the_disk_or_not_allowed_fails_and_the_status_is_last() {
    let world = World::new();
    let attach = session(1);
    let (_control, attached) = world.attach(&attach);
    let mut queue = world.open(&attach, attached.handles, 0);

    assert_eq!(queue.do_block(IN, DISK / 512, &[], 513)[512], 1);
    assert_eq!(queue.do_block(IN, u64::MAX, &[], 513)[512], 1);
    assert_eq!(queue.do_block(IN, 0, &[], 514)[513], 1, "no number of sectors");
    assert_eq!(queue.do_block(OUT, DISK / 512 - 1, &[7; 1024], 1), [1]);
    assert_eq!(queue.do_block(99, 0, &[], 1), [2]);
    let tag = queue.request(b"short", 1, 0);
    let message = queue.answer();
    assert_eq!((message.header.tag, message.header.code()), (tag, Ok(Code::Failed)));

    let fixed = named(session(2), "ann", "fixed");
    let (_control, attached) = world.attach(&fixed);
    let mut queue = world.open(&fixed, attached.handles, 0);
    assert_eq!(queue.do_block(OUT, 0, &[7; 512], 1), [1]);
    assert_eq!(queue.do_block(IN, 0, &[], 513), vec![0; 513]);
}

#[test]
fn large_requests_go_in_fragments_and_hold_up_no_small_one() {
    let world = World::new();
    let attach = session(1);
    let (_control, attached) = world.attach(&attach);
    let mut queue = world.open(&attach, attached.handles, 0);
    let data: Vec<u8> = (0..1_u32 << 20).map(|at| (at % 249) as u8).collect();

    assert_eq!(queue.do_block(OUT, 0, &data, 1), [0]);
    let large = queue.request(&block(IN, 0, &[]), (1 << 20) + 1, 0);
    let small = queue.request(&block(IN, 8, &[]), 513, 0);
    let answers: HashMap<_, _> = (0..2).map(|_| queue.answer()).map(|one| (one.header.tag, one.body)).collect();

    assert_eq!(answers[&large], [&data[..], &[0]].concat());
    assert_eq!(answers[&small], [&data[4096..4608], &[0]].concat());
}

#[test]
fn request_that_was_answered_is_not_done_again_after_a_reconnection() {
    let world = World::new();
    let attach = session(1);
    let (_control, attached) = world.attach(&attach);
    let mut queue = world.open(&attach, attached.handles, 0);
    let tag = queue.request(&block(OUT, 0, &[1; 512]), 1, 0);
    queue.answer();
    assert_eq!(queue.do_block(OUT, 0, &[2; 512], 1), [0]);

    let again = Attach { epoch: 2, ..attach };
    let (_control, attached) = world.attach(&again);
    assert!(attached.resumed);
    let mut later = world.open(&again, attached.handles, 0);
    later.repeat(tag, &block(OUT, 0, &[1; 512]), 1, 0);

    assert_eq!(later.answer().body, [0]);
    assert_eq!(fs::read(world.disk()).unwrap()[0], 2, "the later one was not undone");
    assert!(queue.frame().is_none(), "the earlier connection has ended");
    later.repeat(tag, &block(OUT, 0, &[1; 512]), 1, tag + 1);
    assert!(matches!(later.control(), Control::Refused(Refused { code: Code::Malformed, .. })), "it is settled");
}

#[test]
fn earlier_epochs_are_fenced() {
    let world = World::new();
    let (_control, attached) = world.attach(&Attach { epoch: 5, ..session(1) });

    assert_eq!(world.refusal(&Attach { epoch: 5, ..session(1) }), Code::Fenced);
    assert_eq!(world.refusal(&Attach { epoch: 4, ..session(1) }), Code::Fenced);
    let mut connection = world.connect();
    connection.handles = attached.handles;
    let open = |epoch, number| Control::Open(Open { session: SessionId([number; 16]), epoch, queue: 0 });
    assert!(matches!(connection.ask(&open(4, 1)), Control::Refused(Refused { code: Code::Fenced, .. })));
    let mut connection = world.connect();
    assert!(matches!(connection.ask(&open(5, 9)), Control::Refused(Refused { code: Code::NoSession, .. })));
}

#[test]
fn only_who_is_named_gets_a_module_and_only_what_it_is() {
    let world = World::new();

    assert_eq!(world.refusal(&named(session(1), "eve", "data")), Code::NotAllowed);
    assert_eq!(world.refusal(&named(session(1), "bob", "fixed")), Code::NotAllowed);
    assert_eq!(world.refusal(&named(session(1), "ann", "nothing")), Code::NoModule);
    assert_eq!(world.refusal(&named(session(1), "ann", "random")), Code::OtherDevice);
    let (_control, _) = world.attach(&session(1));
    assert_eq!(
        world.refusal(&Attach { epoch: 2, ..named(session(1), "bob", "data") }),
        Code::NotAllowed,
        "not his session"
    );
}

#[test]
fn resize_interrupts_every_guest_of_the_disk_and_nobody_else() {
    let world = World::new();
    let (mut ann, _) = world.attach(&session(1));
    let (mut bob, _) = world.attach(&named(session(2), "bob", "data"));
    let (mut other, _) = world.attach(&named(session(3), "ann", "fixed"));

    world.server.resize("data", 2 * DISK).unwrap();

    for connection in [&mut ann, &mut bob] {
        let Control::Config(config) = connection.control() else { panic!("no configuration") };
        assert_eq!(config[..8], (2 * DISK / 512).to_le_bytes());
    }
    assert_eq!(other.ask(&Control::Ping), Control::Pong);
    assert_eq!(fs::metadata(world.disk()).unwrap().len(), 2 * DISK);
    assert!(world.server.resize("data", 1000).is_err());
    assert!(world.server.resize("random", 512).is_err());
}

#[test]
fn entropy_comes() {
    let world = World::new();
    let attach = Attach { device: Device::Entropy, ..named(session(1), "ann", "random") };
    let (_control, attached) = world.attach(&attach);
    assert_eq!(attached.queues, 1);
    let mut queue = world.open(&attach, attached.handles, 0);
    let mut next = || {
        queue.request(&[], 64, 0);
        queue.answer().body
    };
    let (one, other) = (next(), next());
    assert_eq!((one.len(), other.len()), (64, 64));
    assert_ne!(one, other);
}

#[test]
fn frames_of_others_and_nonsense_end_the_connection_and_nothing_else() {
    let world = World::new();
    let attach = session(1);
    let (mut control, attached) = world.attach(&attach);
    let mut good = world.open(&attach, attached.handles, 1);
    let changes: [fn(Header) -> Header; 4] = [
        |header| Header { handles: Handles { guest: 77, ..header.handles }, ..header },
        |header| Header { queue: 2, ..header },
        |header| Header { kind: Kind::Answer, ..header },
        |header| Header { kind: Kind::Detach, ..header },
    ];
    for change in changes {
        let mut bad = world.open(&attach, attached.handles, 0);
        let header = Header { queue: 0, room: 1, ..bad.header(0) };
        bad.stream.write_all(&change(header).encode()).unwrap();
        assert!(matches!(bad.control(), Control::Refused(Refused { code: Code::Malformed, .. })));
    }
    let mut noise = TcpStream::connect(world.server.address().unwrap()).unwrap();
    noise.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();

    assert_eq!(control.ask(&Control::Ping), Control::Pong);
    let header = Header { queue: 1, room: 1, kind: Kind::Request, tag: 1, ..good.header(16) };
    good.stream.write_all(&header.encode()).unwrap();
    good.stream.write_all(&block(FLUSH, 0, &[])).unwrap();
    assert_eq!(good.answer().body, [0]);
}

#[test]
fn wish_that_takes_a_module_away_ends_its_sessions_and_lets_the_others_be() {
    let world = World::new();
    let (mut ann, _) = world.attach(&session(1));
    let (mut bob, _) = world.attach(&named(session(2), "bob", "data"));
    let mut wish = world.wish();
    wish.modules[0].guests.remove(1);

    world.server.apply(wish).unwrap();

    assert_eq!(ann.ask(&Control::Ping), Control::Pong);
    assert!(bob.frame().is_none());
    let until = Instant::now() + Duration::from_secs(5);
    while world.server.stats()["sessions"].as_array().unwrap().len() > 1 && Instant::now() < until {}
    assert_eq!(world.server.stats()["sessions"][0]["guest"], "ann");
}
