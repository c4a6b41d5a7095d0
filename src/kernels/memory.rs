//! Memory in large pages, where the system has them: a network's weights and values are read from
//! end to end, and each large page spares hundreds of look-ups of addresses.

use std::ops::{Deref, Range};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// A block of zeroed memory that grows, in large pages where the system has them.
#[derive(Default)]
pub struct Buffer {
    block: Option<(NonNull<f32>, std::alloc::Layout)>,
    len: usize,
}

// SAFETY: the block is owned, like a vector's.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

/// Large pages begin at multiples of this, and blocks of at least as much do too.
const LARGE_PAGE: usize = 2 << 20;

/// Values of a large page.
pub const LARGE_PAGE_VALUES: usize = LARGE_PAGE / size_of::<f32>();

/// Values that a core's second-level cache holds, as the processor tells; else as small ones are: 512 KiB.
pub fn second_level_values() -> usize {
    static VALUES: OnceLock<usize> = OnceLock::new();
    *VALUES.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let kib = {
            use std::arch::x86_64::__cpuid;
            const LAST: u32 = 0x8000_0000;
            const CACHES: u32 = 0x8000_0006;
            if __cpuid(LAST).eax >= CACHES {
                __cpuid(CACHES).ecx >> 16
            } else {
                0
            }
        };
        #[cfg(not(target_arch = "x86_64"))]
        let kib = 0;
        let kib = if (256..=4096).contains(&kib) {
            kib
        } else {
            512
        };
        kib as usize * 1024 / size_of::<f32>()
    })
}

impl Buffer {
    /// Makes room for `len` values, zeros; what the buffer held is lost where it grows.
    pub fn reserve(&mut self, len: usize) {
        if self.len < len {
            self.allocate(len);
            // SAFETY: the block has so many values, and all zero bits are one.
            unsafe { self.pointer().write_bytes(0, len) };
        }
    }

    /// A new block of `len` values that are not initialised.
    fn allocate(&mut self, len: usize) {
        self.free();
        let bytes = len
            .checked_mul(size_of::<f32>())
            .expect("a batch that memory can hold");
        let alignment = if bytes >= LARGE_PAGE { LARGE_PAGE } else { 64 };
        let layout = std::alloc::Layout::from_size_align(bytes, alignment)
            .expect("a batch that memory can hold")
            .pad_to_align();
        // SAFETY: the layout is not empty, since `len` is above the length so far. Zeroed memory
        // would be touched here, before large pages are asked for.
        let Some(block) = NonNull::new(unsafe { std::alloc::alloc(layout) }) else {
            std::alloc::handle_alloc_error(layout);
        };
        use_large_pages(block, layout.size());
        self.block = Some((block.cast(), layout));
        self.len = len;
    }

    fn free(&mut self) {
        self.len = 0;
        if let Some((block, layout)) = self.block.take() {
            // SAFETY: allocated with this layout, and no borrow of it is left.
            unsafe { std::alloc::dealloc(block.as_ptr().cast(), layout) };
        }
    }

    /// The first value's address, for who keeps track of who writes what.
    pub fn pointer(&self) -> *mut f32 {
        self.block
            .map_or(NonNull::dangling(), |(block, _)| block)
            .as_ptr()
    }

    pub fn read(&self, range: Range<usize>) -> &[f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the block, where values have been written: zeros by `reserve`, or a
        // slab's block by who reserved it.
        unsafe { std::slice::from_raw_parts(self.pointer().add(range.start), range.len()) }
    }

    pub fn write(&mut self, range: Range<usize>) -> &mut [f32] {
        self.split(range, &[]).0
    }

    /// One range to write and several to read at the same time.
    ///
    /// # Panics
    /// Where the range to write overlaps one to read, or one lies outside the buffer.
    pub fn split(
        &mut self,
        output: Range<usize>,
        inputs: &[Range<usize>],
    ) -> (&mut [f32], Vec<&[f32]>) {
        let ([output], inputs) = self.split_many([output], inputs);
        (output, inputs)
    }

    /// Several ranges to write and several to read at the same time.
    ///
    /// # Panics
    /// Where a range to write overlaps another, or one lies outside the buffer.
    pub fn split_many<const N: usize>(
        &mut self,
        outputs: [Range<usize>; N],
        inputs: &[Range<usize>],
    ) -> ([&mut [f32]; N], Vec<&[f32]>) {
        for (index, output) in outputs.iter().enumerate() {
            assert!(output.start <= output.end && output.end <= self.len);
            for other in inputs.iter().chain(&outputs[..index]) {
                assert!(
                    other.end <= output.start || output.end <= other.start,
                    "a step reads what it writes"
                );
            }
        }
        let base = self.pointer();
        // SAFETY: all ranges lie inside the block (those to read are checked by `read`); those
        // that are written overlap no other, and `self` stays borrowed mutably as long as the
        // slices live.
        unsafe {
            let this = &*std::ptr::from_mut(self);
            let inputs = inputs
                .iter()
                .map(|range| this.read(range.clone()))
                .collect();
            let outputs = outputs
                .map(|range| std::slice::from_raw_parts_mut(base.add(range.start), range.len()));
            (outputs, inputs)
        }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.free();
    }
}

/// Asks for large pages: fewer misses of the address cache. Worth asking only.
#[cfg(target_os = "linux")]
fn use_large_pages(block: NonNull<u8>, len: usize) {
    if len >= LARGE_PAGE {
        // SAFETY: the range is a block of our own; the advice changes no value in it.
        unsafe { libc::madvise(block.as_ptr().cast(), len, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn use_large_pages(_: NonNull<u8>, _: usize) {}

/// An empty vector with room for so many values, in large pages where it is large.
pub fn in_large_pages(len: usize) -> Vec<f32> {
    let values = Vec::<f32>::with_capacity(len);
    let start = values.as_ptr().cast::<u8>();
    let skipped = start.align_offset(LARGE_PAGE);
    let bytes = len * size_of::<f32>();
    if let Some(block) = NonNull::new(start.wrapping_add(skipped).cast_mut()) {
        use_large_pages(block, bytes.saturating_sub(skipped));
    }
    values
}

/// Has the allocator take addresses for two gibibytes from the system at once, in large pages, and keep what is
/// freed: else each large vector would be mapped, touched and unmapped anew, in small pages. Memory is taken as it
/// is touched, as ever. Called once, before there are threads.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn set_up_allocator() {
    const LARGEST: libc::c_int = 1 << 30;
    const RESERVED: libc::c_int = libc::c_int::MAX - (LARGE_PAGE as libc::c_int - 1);
    const NEVER: libc::c_int = -1;
    // SAFETY: settings of the allocator, which takes them at any time; the block is freed as it was allocated.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
        libc::mallopt(libc::M_TRIM_THRESHOLD, NEVER);
        // More than it has at hand, so that it goes and takes what it then has in reserve.
        libc::mallopt(libc::M_TOP_PAD, RESERVED);
        let block = libc::malloc(LARGE_PAGE).cast::<u8>();
        let end = libc::sbrk(0).cast::<u8>();
        // Where it found no such room, the block lies elsewhere.
        if let (Some(start), true) = (NonNull::new(block), block < end) {
            let skipped = block.align_offset(LARGE_PAGE);
            use_large_pages(start.add(skipped), end.addr() - block.addr() - skipped);
        }
        libc::free(block.cast());
        libc::mallopt(libc::M_TOP_PAD, 16 * LARGE_PAGE as libc::c_int);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn set_up_allocator() {}

/// Hands out blocks of a few large allocations, for values that are written once. Several threads
/// may fill blocks at the same time.
#[derive(Default)]
pub struct Slab(Mutex<Chunk>);

#[derive(Default)]
struct Chunk {
    buffer: Option<Arc<Buffer>>,
    /// Of the buffer.
    used: usize,
    /// In all blocks.
    stored: usize,
}

/// A block of a [`Slab`], which stays as long as it is used.
pub struct Block {
    buffer: Arc<Buffer>,
    range: Range<usize>,
}

/// Values of a chunk, unless a block is larger.
const CHUNK: usize = 4 * LARGE_PAGE_VALUES;

impl Slab {
    /// Values in all blocks so far.
    pub fn stored(&self) -> usize {
        self.lock().stored
    }

    /// A block of `len` values that are not initialised, and part of no other block.
    ///
    /// # Safety
    /// All values are written through [`Block::pointer`] before any is read.
    pub(super) unsafe fn reserve(&self, len: usize) -> Block {
        let mut chunk = self.lock();
        // Blocks begin at cache lines.
        let start = chunk.used.next_multiple_of(64 / size_of::<f32>());
        let (buffer, start) = match &chunk.buffer {
            Some(buffer) if start + len <= buffer.len => (buffer.clone(), start),
            _ => {
                let mut buffer = Buffer::default();
                buffer.allocate(len.max(CHUNK));
                (chunk.buffer.insert(Arc::new(buffer)).clone(), 0)
            }
        };
        let range = start..start + len;
        chunk.used = range.end;
        chunk.stored += len;
        Block { buffer, range }
    }

    fn lock(&self) -> MutexGuard<'_, Chunk> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// The first value's address, for who fills the block.
    pub(super) fn pointer(&self) -> *mut f32 {
        // SAFETY: inside the buffer.
        unsafe { self.buffer.pointer().add(self.range.start) }
    }
}

impl Deref for Block {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        self.buffer.read(self.range.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_values() {
        let slab = Slab::default();
        let values = |i: usize| vec![i as f32; i * i * 1000 + 1];
        let fill = |i: usize| {
            let values = values(i);
            // SAFETY: all values are written before the block is read.
            unsafe {
                let block = slab.reserve(values.len());
                block
                    .pointer()
                    .copy_from_nonoverlapping(values.as_ptr(), values.len());
                block
            }
        };
        let blocks: Vec<Vec<Block>> = std::thread::scope(|scope| {
            let parts = [0, 1].map(|part| {
                scope.spawn(move || (0..40).step_by(2).map(|i| fill(i + part)).collect())
            });
            parts.map(|part| part.join().unwrap()).into()
        });
        let stored: usize = (0..40).map(|i| values(i).len()).sum();
        assert_eq!(slab.stored(), stored);
        drop(slab);
        for (part, blocks) in blocks.iter().enumerate() {
            for (i, block) in blocks.iter().enumerate() {
                assert!(**block == values(2 * i + part)[..], "block {i}");
                assert_eq!(block.as_ptr().addr() % 64, 0);
            }
        }
    }

    #[test]
    #[should_panic(expected = "a step reads what it writes")]
    fn a_split_refuses_ranges_that_overlap() {
        let mut arena = Buffer::default();
        arena.reserve(10);
        arena.split(0..5, &[5..8, 4..6]);
    }
}
