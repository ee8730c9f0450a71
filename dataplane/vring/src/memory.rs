// SPDX-License-Identifier: Apache-2.0

//! A guest's memory, as its VMM shares it with us.
//!
//! A VMM announces regions, each {guest address, size, address in the VMM, file, offset}. They are mapped once, and
//! [`GuestMemory`] is an immutable table of them: a change makes another table that shares the unchanged mappings, so
//! that who looks at the memory never waits for who maps some.
//!
//! # Migration
//!
//! While a guest migrates, its VMM wants to know which of its pages are written. [`DirtyLog`] is the bitmap that it
//! shares for that (vhost-user: "Migration"). A page is marked after it is written, so that it is copied once more in
//! the worst case, and never once too few.
//!
//! # Rules for what is read here
//!
//! The guest's processors write this memory while we read it. So no reference to it is ever made, only raw pointers;
//! what decides something is copied first and then judged; and nothing read twice is taken to be the same.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;

use crate::fault;

/// As many regions as a VMM may announce: its base memory and what is plugged in later.
pub const MAX_REGIONS: usize = 64;

/// Why a region is refused.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It is empty, or its end is beyond what 64 bits can say.
    #[error("memory region of {size} bytes at guest address {guest:#x} is impossible")]
    Impossible {
        /// Guest address.
        guest: u64,
        /// Bytes.
        size: u64,
    },
    /// It overlaps another.
    #[error("memory region at guest address {0:#x} overlaps another")]
    Overlap(u64),
    /// There are too many.
    #[error("more than {MAX_REGIONS} memory regions")]
    TooMany,
    /// It is not there.
    #[error("no memory region at guest address {0:#x}")]
    Unknown(u64),
    /// The file is shorter than the region.
    #[error("memory region at guest address {guest:#x} needs {needed} bytes of a file that has {length}")]
    Short {
        /// Guest address.
        guest: u64,
        /// Bytes up to the region's end.
        needed: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// The kernel refuses to map it.
    #[error("memory region at guest address {guest:#x}: {source}")]
    Map {
        /// Guest address.
        guest: u64,
        /// Why.
        source: io::Error,
    },
}

/// A region as it is announced (vhost-user: "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// Address in the VMM, in which the addresses of rings are given.
    pub user: u64,
    /// Where in the file it begins.
    pub offset: u64,
}

/// A file's beginning, for as long as there is this.
pub(crate) struct Mapping {
    base: NonNull<libc::c_void>,
    length: usize,
    guard: Option<fault::Guard>,
}

// SAFETY: a mapping is only an address range of the process, which any thread may use and unmap.
unsafe impl Send for Mapping {}
// SAFETY: as above; it has no method that changes anything.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: what is mapped at that address a moment later is somebody else's.
        self.guard = None;
        // SAFETY: the range was mapped by `Mapping::new`, and whoever has a pointer into it keeps the mapping alive.
        let unmapped = unsafe { munmap(self.base, self.length) };
        if let Err(error) = unmapped {
            tracing::warn!(%error, "a guest's memory cannot be unmapped");
        }
    }
}

impl Mapping {
    /// Map the file from its beginning, as huge pages want it: a region's offset need not be a multiple of theirs.
    pub(crate) fn new(region: &Region, file: &File) -> Result<Self, MemoryError> {
        let failed = |source: io::Error| MemoryError::Map { guest: region.guest, source };
        let needed = region.offset + region.size;
        let stat = fstat(file.as_fd()).map_err(|error| failed(error.into()))?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        if length < needed {
            return Err(MemoryError::Short { guest: region.guest, needed, length });
        }
        // hugetlbfs gives the size of its pages as that of its blocks.
        let page = u64::try_from(stat.st_blksize).unwrap_or(0).max(4096);
        let length = needed.div_ceil(page).checked_mul(page).and_then(|length| usize::try_from(length).ok());
        let length = length.and_then(NonZeroUsize::new).ok_or_else(|| failed(io::ErrorKind::OutOfMemory.into()))?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that is there.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE,
                file,
                0,
            )
        }
        .map_err(|error| failed(error.into()))?;
        let guard = match fault::Guard::new(base.as_ptr() as usize, length.get()) {
            Ok(guard) => guard,
            Err(error) => {
                // SAFETY: mapped just above, and known to nobody.
                let _ = unsafe { munmap(base, length.get()) };
                return Err(failed(error));
            }
        };
        Ok(Mapping { base, length: length.get(), guard: Some(guard) })
    }

    /// Where byte `offset` of the file is.
    pub(crate) fn at(&self, offset: u64) -> *mut u8 {
        self.base.as_ptr().cast::<u8>().wrapping_add(offset as usize)
    }
}

/// Bytes of a page of the log.
const LOG_PAGE: u64 = 4096;

/// Which pages of a guest have been written.
pub struct DirtyLog {
    bits: *mut u8,
    length: u64,
    /// Kept for `bits`.
    _mapping: Mapping,
}

// SAFETY: the bitmap is only changed by atomic operations, and its mapping lives as long as it does.
unsafe impl Send for DirtyLog {}
// SAFETY: as above.
unsafe impl Sync for DirtyLog {}

impl DirtyLog {
    /// The bitmap of `length` bytes at `offset` of a file.
    ///
    /// # Errors
    ///
    /// See [`MemoryError`].
    pub fn new(file: &File, offset: u64, length: u64) -> Result<Self, MemoryError> {
        let region = Region { guest: 0, size: length, user: 0, offset };
        if length == 0 || offset.checked_add(length).is_none() {
            return Err(MemoryError::Impossible { guest: 0, size: length });
        }
        let mapping = Mapping::new(&region, file)?;
        Ok(DirtyLog { bits: mapping.at(offset), length, _mapping: mapping })
    }

    /// Say that `length` bytes at the guest's address `guest` have been written. What is beyond the log is not there.
    pub fn mark(&self, guest: u64, length: u64) {
        let Some(last) = length.checked_sub(1).and_then(|more| guest.checked_add(more)) else { return };
        for page in guest / LOG_PAGE..=last / LOG_PAGE {
            if page / 8 < self.length {
                // SAFETY: the byte is within the bitmap. The VMM takes bits out of it at the same time, hence an atomic.
                let byte = unsafe { AtomicU8::from_ptr(self.bits.add((page / 8) as usize)) };
                byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
            }
        }
    }
}

impl std::fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "DirtyLog({} bytes)", self.length)
    }
}

#[derive(Clone)]
struct Mapped {
    region: Region,
    host: *mut u8,
    /// Kept for `host`.
    _mapping: Arc<Mapping>,
}

/// Bytes of a guest that lie together, valid as long as the [`GuestMemory`] (or one made from it) is there.
#[derive(Clone, Copy, Debug)]
pub struct Segment {
    /// Where they are in this process.
    pub data: *mut u8,
    /// How many there are.
    pub length: u32,
}

/// The regions of a guest.
#[derive(Clone, Default)]
pub struct GuestMemory {
    /// The largest first, because that is where most buffers are.
    regions: Vec<Mapped>,
}

// SAFETY: the pointers lead into mappings that the table itself keeps alive; they are only handed out as raw pointers.
unsafe impl Send for GuestMemory {}
// SAFETY: as above; a table is never changed.
unsafe impl Sync for GuestMemory {}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|mapped| &mapped.region)).finish()
    }
}

impl GuestMemory {
    /// This memory and one more region.
    ///
    /// # Errors
    ///
    /// See [`MemoryError`].
    pub fn with(&self, region: Region, file: &File) -> Result<Self, MemoryError> {
        let ends = |start: u64| start.checked_add(region.size);
        let (guest_end, user_end, file_end) = (ends(region.guest), ends(region.user), ends(region.offset));
        if region.size == 0 || user_end.is_none() || file_end.is_none() {
            return Err(MemoryError::Impossible { guest: region.guest, size: region.size });
        }
        let Some(guest_end) = guest_end else {
            return Err(MemoryError::Impossible { guest: region.guest, size: region.size });
        };
        if self.regions.len() == MAX_REGIONS {
            return Err(MemoryError::TooMany);
        }
        let overlaps = |other: &Region| region.guest < other.guest + other.size && other.guest < guest_end;
        if self.regions.iter().any(|mapped| overlaps(&mapped.region)) {
            return Err(MemoryError::Overlap(region.guest));
        }
        let mapping = Arc::new(Mapping::new(&region, file)?);
        let host = mapping.at(region.offset);
        let mut regions = self.regions.clone();
        let place = regions.partition_point(|mapped| mapped.region.size >= region.size);
        regions.insert(place, Mapped { region, host, _mapping: mapping });
        Ok(GuestMemory { regions })
    }

    /// This memory without a region.
    ///
    /// # Errors
    ///
    /// There is no such region.
    pub fn without(&self, region: &Region) -> Result<Self, MemoryError> {
        let gone =
            |other: &Region| other.guest == region.guest && other.size == region.size && other.user == region.user;
        let mut regions = self.regions.clone();
        let index = regions.iter().position(|mapped| gone(&mapped.region));
        regions.remove(index.ok_or(MemoryError::Unknown(region.guest))?);
        Ok(GuestMemory { regions })
    }

    /// What lies at the guest's address `guest`: up to `length` bytes, fewer where the region ends.
    #[inline]
    pub fn at(&self, guest: u64, length: u32) -> Option<Segment> {
        for mapped in &self.regions {
            let offset = guest.wrapping_sub(mapped.region.guest);
            if offset < mapped.region.size {
                let left = mapped.region.size - offset;
                let length = if u64::from(length) <= left { length } else { left as u32 };
                // SAFETY: `offset` is within the region, and the region within its mapping.
                let data = unsafe { mapped.host.add(offset as usize) };
                return Some(Segment { data, length });
            }
        }
        None
    }

    /// The guest's address of a segment.
    pub fn guest_address(&self, segment: &Segment) -> Option<u64> {
        self.regions.iter().find_map(|mapped| {
            let offset = (segment.data as u64).wrapping_sub(mapped.host as u64);
            (offset < mapped.region.size).then(|| mapped.region.guest + offset)
        })
    }

    /// The `length` bytes at an address of the VMM, if they all lie in one region.
    pub fn at_user(&self, user: u64, length: usize) -> Option<NonNull<u8>> {
        self.regions.iter().find_map(|mapped| {
            let offset = user.wrapping_sub(mapped.region.user);
            let fits = offset < mapped.region.size && mapped.region.size - offset >= length as u64;
            // SAFETY: `offset` is within the region, and the region within its mapping.
            fits.then(|| unsafe { NonNull::new_unchecked(mapped.host.add(offset as usize)) })
        })
    }

    /// How many mappings are shared with `other`.
    #[cfg(test)]
    fn shared(&self, other: &GuestMemory) -> usize {
        let is_in = |mapping: &Arc<Mapping>| other.regions.iter().any(|mapped| Arc::ptr_eq(&mapped._mapping, mapping));
        self.regions.iter().filter(|mapped| is_in(&mapped._mapping)).count()
    }
}

/// Copy bytes of a guest's segments, from `skip` on, to `to`; gives how many there were.
///
/// # Safety
///
/// The memory that the segments are of is still there.
#[inline]
pub unsafe fn copy_from(segments: &[Segment], mut skip: usize, to: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        let length = segment.length as usize;
        if skip >= length {
            skip -= length;
            continue;
        }
        let count = (length - skip).min(to.len() - done);
        // SAFETY: `skip + count` is within the segment, and `done + count` within `to`, which is no guest's memory.
        unsafe { std::ptr::copy_nonoverlapping(segment.data.add(skip), to.as_mut_ptr().add(done), count) };
        done += count;
        skip = 0;
        if done == to.len() {
            break;
        }
    }
    done
}

/// Writes one after the other into a guest's segments.
pub struct Writer<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are written already.
    used: usize,
}

impl<'a> Writer<'a> {
    /// Begin at the first byte of `segments`.
    ///
    /// # Safety
    ///
    /// The memory that the segments are of stays there as long as the writer does.
    #[inline]
    pub unsafe fn new(segments: &'a [Segment]) -> Self {
        Writer { segments, used: 0 }
    }

    /// Write `length` bytes; what has no room is left out.
    ///
    /// # Safety
    ///
    /// `data` leads to as many bytes. They may be a guest's, even the same guest's.
    #[inline]
    pub unsafe fn write(&mut self, mut data: *const u8, mut length: usize) {
        while length > 0 {
            let Some(segment) = self.segments.first() else { return };
            let count = (segment.length as usize - self.used).min(length);
            // SAFETY: `used + count` is within the segment, and `data` has `length` bytes. Two ports may show us the
            // same memory, so the two may overlap.
            unsafe { std::ptr::copy(data, segment.data.add(self.used), count) };
            self.used += count;
            length -= count;
            // SAFETY: `count` bytes of `data` have been there.
            data = unsafe { data.add(count) };
            if self.used == segment.length as usize {
                self.segments = &self.segments[1..];
                self.used = 0;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    /// A file in memory of `length` bytes.
    pub(crate) fn memory_file(length: u64) -> File {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(length).unwrap();
        file
    }

    fn region(guest: u64, size: u64) -> Region {
        Region { guest, size, user: guest + (1 << 40), offset: 0 }
    }

    #[test]
    fn test_at_ends_with_its_region() {
        let file = memory_file(0x3000);
        let memory = GuestMemory::default().with(region(0x1000, 0x1000), &file).unwrap();
        let memory = memory.with(region(0x2000, 0x2000), &file).unwrap();
        assert_eq!(memory.at(0x1ff0, 0x20).unwrap().length, 0x10);
        assert_eq!(memory.at(0x2000, 0x20).unwrap().length, 0x20);
        assert!(memory.at(0x4000, 1).is_none());
        assert!(memory.at(0xfff, 1).is_none());
        assert!(memory.at(u64::MAX, 1).is_none());
    }

    #[test]
    fn test_at_user_never_crosses_regions() {
        let file = memory_file(0x3000);
        let memory = GuestMemory::default().with(region(0x1000, 0x1000), &file).unwrap();
        let memory = memory.with(region(0x2000, 0x2000), &file).unwrap();
        assert!(memory.at_user((1 << 40) + 0x1f00, 0x100).is_some());
        assert!(memory.at_user((1 << 40) + 0x1f00, 0x101).is_none());
        assert!(memory.at_user(0x1f00, 1).is_none());
    }

    #[test]
    fn test_with_impossible_region_returns_error() {
        let file = memory_file(0x2000);
        let memory = GuestMemory::default().with(region(0x1000, 0x1000), &file).unwrap();
        assert!(matches!(memory.with(region(0x1800, 0x1000), &file), Err(MemoryError::Overlap(_))));
        assert!(matches!(memory.with(region(0x8000, 0), &file), Err(MemoryError::Impossible { .. })));
        assert!(matches!(memory.with(region(0x8000, 0x3000), &file), Err(MemoryError::Short { .. })));
        let wraps = Region { guest: u64::MAX - 5, size: 0x1000, user: 0, offset: 0 };
        assert!(matches!(memory.with(wraps, &file), Err(MemoryError::Impossible { .. })));
        let far = Region { guest: 0x8000, size: 0x1000, user: 0, offset: u64::MAX - 5 };
        assert!(matches!(memory.with(far, &file), Err(MemoryError::Impossible { .. })));
    }

    #[test]
    fn test_without_keeps_the_other_mappings() {
        let file = memory_file(0x2000);
        let one = GuestMemory::default().with(region(0x1000, 0x1000), &file).unwrap();
        let two = one.with(region(0x2000, 0x1000), &file).unwrap();
        assert_eq!(two.shared(&one), 1);
        let back = two.without(&region(0x2000, 0x1000)).unwrap();
        assert_eq!(back.shared(&one), 1);
        assert!(matches!(back.without(&region(0x2000, 0x1000)), Err(MemoryError::Unknown(0x2000))));
    }

    #[test]
    fn test_offset_leads_into_the_file() {
        let file = memory_file(0x3000);
        let whole = GuestMemory::default().with(region(0, 0x3000), &file).unwrap();
        let part = GuestMemory::default()
            .with(Region { guest: 0x9000, size: 0x1000, user: 0, offset: 0x1000 }, &file)
            .unwrap();
        // SAFETY: both segments are in mappings that live to the end of the test.
        unsafe {
            Writer::new(&[whole.at(0x1004, 4).unwrap()]).write([1, 2, 3, 4].as_ptr(), 4);
            let mut bytes = [0; 4];
            assert_eq!(copy_from(&[part.at(0x9000, 8).unwrap()], 4, &mut bytes), 4);
            assert_eq!(bytes, [1, 2, 3, 4]);
        }
    }

    #[test]
    fn test_writer_and_copy_cross_segments() {
        let file = memory_file(0x1000);
        let memory = GuestMemory::default().with(region(0, 0x1000), &file).unwrap();
        let segments = [memory.at(0, 3).unwrap(), memory.at(100, 2).unwrap(), memory.at(200, 9).unwrap()];
        let mut bytes = [0; 8];
        // SAFETY: the segments are in a mapping that lives to the end of the test.
        unsafe {
            let mut writer = Writer::new(&segments);
            writer.write([1, 2, 3, 4].as_ptr(), 4);
            writer.write([5, 6, 7].as_ptr(), 3);
            assert_eq!(copy_from(&segments, 1, &mut bytes[..6]), 6);
        }
        assert_eq!(bytes, [2, 3, 4, 5, 6, 7, 0, 0]);
    }

    #[test]
    fn test_log_marks_each_page_that_is_touched() {
        let file = memory_file(0x2000);
        let log = DirtyLog::new(&file, 0x1000, 2).unwrap();
        let bits = GuestMemory::default().with(region(0, 0x2000), &file).unwrap();
        log.mark(0xfff, 2);
        log.mark(0x9000, 0x1000);
        log.mark(0xf000, 0x8000);
        log.mark(0x5000, 0);
        log.mark(u64::MAX, 2);
        let mut bytes = [0; 4];
        // SAFETY: the mapping lives to the end of the test.
        unsafe { copy_from(&[bits.at(0x1000, 4).unwrap()], 0, &mut bytes) };
        assert_eq!(bytes, [0b11, 0b1000_0010, 0, 0]);
        assert!(DirtyLog::new(&file, 0x1000, 0x1001).is_err());
        assert!(DirtyLog::new(&file, u64::MAX, 2).is_err());
        assert!(DirtyLog::new(&file, 0, 0).is_err());
    }

    #[test]
    fn test_guest_address_is_that_of_the_region() {
        let file = memory_file(0x2000);
        let memory = GuestMemory::default().with(region(0x1000, 0x1000), &file).unwrap();
        let memory = memory.with(region(0x8000, 0x2000), &file).unwrap();
        for guest in [0x1000, 0x1fff, 0x8000, 0x9fff] {
            assert_eq!(memory.guest_address(&memory.at(guest, 1).unwrap()), Some(guest));
        }
    }

    #[test]
    fn test_memory_that_is_taken_away_reads_as_zeros() {
        fault::install().unwrap();
        let file = memory_file(0x4000);
        let memory = GuestMemory::default().with(region(0, 0x4000), &file).unwrap();
        file.set_len(0x1000).unwrap();
        let mut bytes = [1; 4];
        // SAFETY: the mapping is there, though not what was behind it.
        unsafe { copy_from(&[memory.at(0x2000, 4).unwrap()], 0, &mut bytes) };
        assert_eq!(bytes, [0; 4]);
    }
}
