// SPDX-License-Identifier: Apache-2.0

//! Bodies of the frames that set up a session.

use std::fmt;

use crate::bytes::{Malformed, Reader, put_block, put_name};
use crate::frame::{Code, Header, Kind};
use crate::numbered::numbered;
use crate::{MAX_CONFIG, MAX_NAME};

const MAX_TEXT: usize = 1024;

/// What stands for the names of who talks to whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Handles {
    /// Of the client host.
    pub client: u32,
    /// Of the guest.
    pub guest: u32,
    /// Of the server.
    pub server: u32,
    /// Of the module.
    pub module: u32,
}

impl Handles {
    /// In the order of the wire.
    pub fn to_array(self) -> [u32; 4] {
        [self.client, self.guest, self.server, self.module]
    }
}

/// Who talks to whom.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Names {
    /// The client host.
    pub client: String,
    /// The guest.
    pub guest: String,
    /// The server that has the module, as far as the client knows.
    pub server: String,
    /// The module.
    pub module: String,
}

/// A session's number: random, so that nobody guesses another one's.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl fmt::Debug for SessionId {
    /// Half of it: enough to tell sessions apart in a log, too little to take one over.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

numbered! {
    /// What a module acts as, by the numbers of VIRTIO 1.2, section 5.
    Device: u16, |_| Malformed::Value("device"), {
        /// A NIC.
        Net = 1,
        /// A disk.
        Block = 2,
        /// A console.
        Console = 3,
        /// A source of entropy.
        Entropy = 4,
    }
}

/// A client asks for a module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attach {
    /// Who asks for what.
    pub names: Names,
    /// For which session.
    pub session: SessionId,
    /// Which of its connections this is.
    pub epoch: u32,
    /// What the guest takes the module for.
    pub device: Device,
    /// Virtqueues that the guest may use.
    pub queues: u16,
    /// Servers that the request has come through; the client's is 0.
    pub hops: u8,
    /// All tags below this have been answered, for each queue that was open before: what was remembered of them can go.
    pub settled: Vec<u64>,
}

impl Attach {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(256);
        let Names { client, guest, server, module } = &self.names;
        for name in [client, guest, server, module] {
            put_name(&mut body, name);
        }
        body.extend_from_slice(&self.session.0);
        body.extend_from_slice(&self.epoch.to_le_bytes());
        body.extend_from_slice(&(self.device as u16).to_le_bytes());
        body.extend_from_slice(&self.queues.to_le_bytes());
        body.push(self.hops);
        body.extend_from_slice(&(self.settled.len() as u16).to_le_bytes());
        for tag in &self.settled {
            body.extend_from_slice(&tag.to_le_bytes());
        }
        body
    }

    /// As it has come.
    ///
    /// # Errors
    ///
    /// The body is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let [client, guest, server, module] = {
            let mut next = || reader.name("names");
            [next()?, next()?, next()?, next()?]
        };
        let session = SessionId(reader.array("session")?);
        let epoch = reader.u32("epoch")?;
        let device = reader.u16("device")?.try_into()?;
        let queues = reader.u16("number of queues")?;
        let hops = reader.u8("number of servers")?;
        let count = reader.u16("settled tags")?;
        if count > queues {
            return Err(Malformed::Value("queue"));
        }
        let settled = (0..count).map(|_| reader.u64("settled tags")).collect::<Result<_, _>>()?;
        reader.end()?;
        Ok(Attach { names: Names { client, guest, server, module }, session, epoch, device, queues, hops, settled })
    }
}

/// A server accepts a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// What stands for the names from now on.
    pub handles: Handles,
    /// Features of the virtio device.
    pub features: u64,
    /// Virtqueues that the module has.
    pub queues: u16,
    /// Descriptors of each, at most.
    pub queue_size: u16,
    /// The server remembers the session: requests that have no answer can be sent again.
    pub resumed: bool,
    /// The device's configuration.
    pub config: Vec<u8>,
}

impl Attached {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(64 + self.config.len());
        for handle in self.handles.to_array() {
            body.extend_from_slice(&handle.to_le_bytes());
        }
        body.extend_from_slice(&self.features.to_le_bytes());
        body.extend_from_slice(&self.queues.to_le_bytes());
        body.extend_from_slice(&self.queue_size.to_le_bytes());
        body.push(self.resumed.into());
        put_block(&mut body, &self.config);
        body
    }

    /// As it has come.
    ///
    /// # Errors
    ///
    /// The body is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let [client, guest, server, module] = {
            let mut next = || reader.u32("handles");
            [next()?, next()?, next()?, next()?]
        };
        let attached = Attached {
            handles: Handles { client, guest, server, module },
            features: reader.u64("features")?,
            queues: reader.u16("number of queues")?,
            queue_size: reader.u16("size of queues")?,
            resumed: match reader.u8("whether it is resumed")? {
                0 => false,
                1 => true,
                _ => return Err(Malformed::Value("truth")),
            },
            config: reader.block(MAX_CONFIG, "a configuration")?,
        };
        reader.end()?;
        Ok(attached)
    }
}

/// Why a connection ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// For programs.
    pub code: Code,
    /// For people: a line, without the names that the client knows itself.
    pub text: String,
}

impl Refused {
    /// As it is sent. A text that is too long is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut end = self.text.len().min(MAX_TEXT);
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let mut body = (self.code as u32).to_le_bytes().to_vec();
        put_block(&mut body, &self.text.as_bytes()[..end]);
        body
    }

    /// As it has come. What a terminal would obey is taken out of the text.
    ///
    /// # Errors
    ///
    /// The body is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let code = reader.u32("code")?.try_into()?;
        let text = reader.block(MAX_TEXT, "a text")?;
        reader.end()?;
        let text = String::from_utf8_lossy(&text).chars().filter(|letter| !letter.is_control()).collect();
        Ok(Refused { code, text })
    }
}

/// A client opens a queue of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Open {
    /// Of which.
    pub session: SessionId,
    /// Which of its connections this belongs to.
    pub epoch: u32,
    /// Number of the virtqueue.
    pub queue: u16,
}

impl Open {
    /// As it is sent.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = self.session.0.to_vec();
        body.extend_from_slice(&self.epoch.to_le_bytes());
        body.extend_from_slice(&self.queue.to_le_bytes());
        body
    }

    /// As it has come.
    ///
    /// # Errors
    ///
    /// The body is none.
    pub fn decode(body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let open = Open {
            session: SessionId(reader.array("session")?),
            epoch: reader.u32("epoch")?,
            queue: reader.u16("number of the queue")?,
        };
        reader.end()?;
        Ok(open)
    }
}

/// A frame that is no request and no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Control {
    /// See [`Kind::Attach`].
    Attach(Attach),
    /// See [`Kind::Attached`].
    Attached(Attached),
    /// See [`Kind::Refused`].
    Refused(Refused),
    /// See [`Kind::Redirect`]: address and port.
    Redirect(String),
    /// See [`Kind::Features`].
    Features(u64),
    /// See [`Kind::Config`].
    Config(Vec<u8>),
    /// See [`Kind::WriteConfig`].
    WriteConfig {
        /// Where it begins.
        offset: u32,
        /// What is written.
        bytes: Vec<u8>,
    },
    /// See [`Kind::Detach`].
    Detach,
    /// See [`Kind::Ping`].
    Ping,
    /// See [`Kind::Pong`].
    Pong,
    /// See [`Kind::Open`].
    Open(Open),
    /// See [`Kind::Opened`].
    Opened,
}

impl Control {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Control::Attach(_) => Kind::Attach,
            Control::Attached(_) => Kind::Attached,
            Control::Refused(_) => Kind::Refused,
            Control::Redirect(_) => Kind::Redirect,
            Control::Features(_) => Kind::Features,
            Control::Config(_) => Kind::Config,
            Control::WriteConfig { .. } => Kind::WriteConfig,
            Control::Detach => Kind::Detach,
            Control::Ping => Kind::Ping,
            Control::Pong => Kind::Pong,
            Control::Open(_) => Kind::Open,
            Control::Opened => Kind::Opened,
        }
    }

    /// The frame, header and all.
    pub fn encode(&self, handles: Handles) -> Vec<u8> {
        let body = match self {
            Control::Attach(attach) => attach.encode(),
            Control::Attached(attached) => attached.encode(),
            Control::Refused(refused) => refused.encode(),
            Control::Redirect(address) => {
                let mut body = Vec::new();
                put_name(&mut body, address);
                body
            }
            Control::Features(features) => features.to_le_bytes().to_vec(),
            Control::Config(config) => config.clone(),
            Control::WriteConfig { offset, bytes } => [&offset.to_le_bytes(), bytes.as_slice()].concat(),
            Control::Open(open) => open.encode(),
            Control::Detach | Control::Ping | Control::Pong | Control::Opened => Vec::new(),
        };
        let mut frame = Header::control(self.kind(), handles, body.len()).encode().to_vec();
        frame.extend_from_slice(&body);
        frame
    }

    /// The message of a whole frame.
    ///
    /// # Errors
    ///
    /// It is none, or is a request or an answer.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(body);
        let control = match kind {
            Kind::Attach => return Attach::decode(body).map(Control::Attach),
            Kind::Attached => return Attached::decode(body).map(Control::Attached),
            Kind::Refused => return Refused::decode(body).map(Control::Refused),
            Kind::Open => return Open::decode(body).map(Control::Open),
            Kind::Config | Kind::WriteConfig => {
                let offset = if kind == Kind::WriteConfig { reader.u32("offset")? } else { 0 };
                let bytes = reader.rest();
                if offset as usize + bytes.len() > MAX_CONFIG {
                    let length = u64::from(offset) + bytes.len() as u64;
                    return Err(Malformed::Length { what: "a configuration", length, limit: MAX_CONFIG });
                }
                let bytes = bytes.to_vec();
                return Ok(match kind {
                    Kind::Config => Control::Config(bytes),
                    _ => Control::WriteConfig { offset, bytes },
                });
            }
            Kind::Redirect => Control::Redirect(reader.name("an address")?),
            Kind::Features => Control::Features(reader.u64("features")?),
            Kind::Detach => Control::Detach,
            Kind::Ping => Control::Ping,
            Kind::Pong => Control::Pong,
            Kind::Opened => Control::Opened,
            Kind::Request | Kind::Answer => return Err(Malformed::Kind(kind as u8)),
        };
        reader.end()?;
        Ok(control)
    }
}

/// Whether a name can be sent.
pub fn is_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= MAX_NAME && !name.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attach() -> Attach {
        let names =
            Names { client: "alpha".into(), guest: "ann".into(), server: "beta".into(), module: "blk-data".into() };
        Attach {
            names,
            session: SessionId([7; 16]),
            epoch: 3,
            device: Device::Block,
            queues: 4,
            hops: 1,
            settled: vec![1, u64::MAX],
        }
    }

    fn each() -> Vec<Control> {
        let handles = Handles { client: 1, guest: 2, server: 3, module: 4 };
        let config = vec![1, 2, 3];
        let attached =
            Attached { handles, features: 1 << 32, queues: 4, queue_size: 256, resumed: true, config: config.clone() };
        vec![
            Control::Attach(attach()),
            Control::Attached(attached),
            Control::Refused(Refused { code: Code::NoModule, text: "there is none".into() }),
            Control::Redirect("192.0.2.1:7700".into()),
            Control::Features(u64::MAX),
            Control::Config(config.clone()),
            Control::WriteConfig { offset: 32, bytes: config },
            Control::Detach,
            Control::Ping,
            Control::Pong,
            Control::Open(Open { session: SessionId([9; 16]), epoch: 1, queue: 2 }),
            Control::Opened,
        ]
    }

    #[test]
    fn what_is_sent_is_what_comes() {
        for control in each() {
            let frame = control.encode(Handles::default());
            let (header, body) = frame.split_first_chunk().unwrap();
            let header = Header::decode(header).unwrap();
            assert_eq!(header.length as usize, body.len());
            assert_eq!(Control::decode(header.kind, body), Ok(control));
        }
    }

    #[test]
    fn bodies_that_are_cut_or_go_on_are_refused() {
        for control in each() {
            let body = &control.encode(Handles::default())[Header::SIZE..];
            let free = matches!(control, Control::Config(_) | Control::WriteConfig { .. });
            for length in 0..body.len() {
                assert!(free || Control::decode(control.kind(), &body[..length]).is_err(), "{control:?} {length}");
            }
            let long = [body, &[0]].concat();
            assert!(free || Control::decode(control.kind(), &long).is_err(), "{control:?}");
        }
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "a\nb", "\u{1b}[31m"] {
            let names = Names { module: name.into(), ..attach().names };
            assert_eq!(Attach::decode(&Attach { names, ..attach() }.encode()), Err(Malformed::Name));
            assert!(!is_name(name));
        }
    }

    #[test]
    fn texts_are_cut_and_cleaned() {
        let refused = Refused { code: Code::Failed, text: format!("{}\u{1b}[31m", "ä".repeat(600)) };
        let text = Refused::decode(&refused.encode()).unwrap().text;
        assert_eq!(text, "ä".repeat(512));
        let refused = Refused { code: Code::Failed, text: "a\u{1b}[31mb\n".into() };
        assert_eq!(Refused::decode(&refused.encode()).unwrap().text, "a[31mb");
    }

    #[test]
    fn more_settled_tags_than_queues_are_refused() {
        let body = Attach { queues: 1, ..attach() }.encode();
        assert_eq!(Attach::decode(&body), Err(Malformed::Value("queue")));
    }

    #[test]
    fn log_does_not_show_the_whole_number_of_a_session() {
        assert_eq!(format!("{:?}", SessionId([0xab; 16])), "ab".repeat(8));
    }

    proptest! {
        #[test]
        fn whatever_comes_is_refused_or_is_what_was_sent(
            kind in prop::sample::select(vec![1_u8, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 17]),
            body in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let kind = kind.try_into().unwrap();
            if let Ok(control) = Control::decode(kind, &body)
                && !matches!(control, Control::Refused(_))
            {
                prop_assert_eq!(&control.encode(Handles::default())[Header::SIZE..], &body[..]);
            }
        }
    }
}
