//! One block of memory for all values of a plan.

use std::ops::Range;
use std::ptr::NonNull;

/// Index of a value in a plan.
pub(super) type ValueId = usize;

/// Values are placed at multiples of a cache line.
const ALIGNMENT: usize = 64 / size_of::<f32>();

/// From the step that writes a value to the last that reads it, and its length for one image.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lifetime {
    pub first: usize,
    pub last: usize,
    pub len: usize,
}

/// Where a value lies, for a batch of one; a batch of N scales offset and length by N.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    offset: usize,
    len: usize,
}

impl Slot {
    /// The value's place in the arena, for a batch of `count`.
    pub fn range(&self, count: usize) -> Range<usize> {
        self.offset * count..(self.offset + self.len) * count
    }
}

/// Gives every value a place such that no two that are alive at one step overlap: the largest
/// first, each at the lowest place that is free.
pub(super) fn place(lifetimes: &[Lifetime]) -> Vec<Slot> {
    let mut order: Vec<ValueId> = (0..lifetimes.len()).collect();
    order.sort_by_key(|&v| (std::cmp::Reverse(lifetimes[v].len), v));
    let mut slots: Vec<Option<Slot>> = vec![None; lifetimes.len()];
    for value in order {
        let life = lifetimes[value];
        let mut taken: Vec<Slot> = (0..lifetimes.len())
            .filter(|&v| lifetimes[v].first <= life.last && life.first <= lifetimes[v].last)
            .filter_map(|v| slots[v])
            .collect();
        taken.sort_by_key(|slot| slot.offset);
        let mut offset = 0;
        for slot in taken {
            if offset + life.len <= slot.offset {
                break;
            }
            offset = offset.max((slot.offset + slot.len).next_multiple_of(ALIGNMENT));
        }
        slots[value] = Some(Slot {
            offset,
            len: life.len,
        });
    }
    slots.into_iter().flatten().collect()
}

/// Length of the arena for a batch of one.
pub(super) fn per_image(slots: &[Slot]) -> usize {
    slots.iter().map(|s| s.offset + s.len).max().unwrap_or(0)
}

/// A block of zeroed memory that grows, in large pages where the system has them.
#[derive(Default)]
pub(super) struct Buffer {
    block: Option<(NonNull<f32>, std::alloc::Layout)>,
    len: usize,
}

// SAFETY: the block is owned, like a vector's.
unsafe impl Send for Buffer {}
unsafe impl Sync for Buffer {}

/// Large pages begin at multiples of this, and blocks of at least as much do too.
const LARGE_PAGE: usize = 2 << 20;

impl Buffer {
    /// Makes room for `len` values; what the buffer held is lost where it grows.
    pub fn reserve(&mut self, len: usize) {
        if self.len >= len {
            return;
        }
        self.free();
        let bytes = len
            .checked_mul(size_of::<f32>())
            .expect("a batch that memory can hold");
        let alignment = if bytes >= LARGE_PAGE { LARGE_PAGE } else { 64 };
        let layout = std::alloc::Layout::from_size_align(bytes, alignment)
            .expect("a batch that memory can hold")
            .pad_to_align();
        // SAFETY: the layout is not empty, since `len` is above the length so far.
        let Some(block) = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) }) else {
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

    fn pointer(&self) -> *mut f32 {
        self.block
            .map_or(NonNull::dangling(), |(block, _)| block)
            .as_ptr()
    }

    pub fn read(&self, range: Range<usize>) -> &[f32] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: inside the block, which is initialised with zeros.
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
        assert!(output.start <= output.end && output.end <= self.len);
        for input in inputs {
            assert!(
                input.end <= output.start || output.end <= input.start,
                "a step reads what it writes"
            );
        }
        let base = self.pointer();
        // SAFETY: all ranges lie inside the block (those to read are checked by `read`); the one
        // that is written overlaps none that is read, and `self` stays borrowed mutably as long
        // as the slices live.
        unsafe {
            let this = &*std::ptr::from_mut(self);
            let inputs = inputs
                .iter()
                .map(|range| this.read(range.clone()))
                .collect();
            let output = std::slice::from_raw_parts_mut(base.add(output.start), output.len());
            (output, inputs)
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

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn values_alive_together_never_overlap() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        for _ in 0..200 {
            let lifetimes: Vec<Lifetime> = (0..rng.random_range(1..40))
                .map(|_| {
                    let first = rng.random_range(0..30);
                    let last = first + rng.random_range(0..10);
                    let len = rng.random_range(1..500);
                    Lifetime { first, last, len }
                })
                .collect();
            let slots = place(&lifetimes);
            for (i, a) in lifetimes.iter().enumerate() {
                assert_eq!(slots[i].len, a.len);
                for (j, b) in lifetimes.iter().enumerate().skip(i + 1) {
                    let together = a.first <= b.last && b.first <= a.last;
                    let (x, y) = (slots[i].range(3), slots[j].range(3));
                    let overlap = x.start < y.end && y.start < x.end;
                    assert!(!(together && overlap), "{a:?} at {x:?}, {b:?} at {y:?}");
                }
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
