// SPDX-License-Identifier: Apache-2.0

//! A source of entropy: the random numbers of the server's kernel (VIRTIO 1.2, section 5.4).

use wire::{Code, Device};

use crate::module::{Module, Next, Request};

/// Bytes for one request, at most: a driver asks for 64 or so.
const MOST: usize = 64 * 1024;

/// See the module's documentation.
#[derive(Debug, Default)]
pub struct Entropy;

impl Module for Entropy {
    fn device(&self) -> Device {
        Device::Entropy
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> u16 {
        1
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn begin(&self, request: Request) -> Next {
        let mut bytes = vec![0; request.room.min(MOST)];
        Next::Done(match getrandom::fill(&mut bytes) {
            Ok(()) => Ok(bytes),
            Err(_) => Err(Code::Failed),
        })
    }

    fn repeatable(&self, _: &Request) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(room: usize) -> Vec<u8> {
        match Entropy.begin(Request { queue: 0, given: Vec::new(), room }) {
            Next::Done(Ok(bytes)) => bytes,
            _ => panic!("no answer"),
        }
    }

    #[test]
    fn bytes_are_as_many_as_asked_for_and_differ() {
        assert_eq!(answer(64).len(), 64);
        assert_ne!(answer(64), answer(64));
        assert_eq!(answer(1 << 20).len(), MOST);
        assert_eq!(answer(0).len(), 0);
    }
}
