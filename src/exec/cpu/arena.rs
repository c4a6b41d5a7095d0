//! One block of memory for all values of a plan.

use std::ops::Range;

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

/// The memory itself; grows to the largest batch seen.
#[derive(Default)]
pub(super) struct Arena {
    data: Vec<f32>,
}

impl Arena {
    pub fn reserve(&mut self, len: usize) {
        if self.data.len() < len {
            self.data.resize(len, 0.0);
        }
    }

    pub fn read(&self, range: Range<usize>) -> &[f32] {
        &self.data[range]
    }

    pub fn write(&mut self, range: Range<usize>) -> &mut [f32] {
        &mut self.data[range]
    }

    /// One range to write and several to read at the same time.
    ///
    /// # Panics
    /// Where the range to write overlaps one to read, or one lies outside the arena.
    pub fn split(
        &mut self,
        output: Range<usize>,
        inputs: &[Range<usize>],
    ) -> (&mut [f32], Vec<&[f32]>) {
        let len = self.data.len();
        let base = self.data.as_mut_ptr();
        assert!(output.start <= output.end && output.end <= len);
        for input in inputs {
            assert!(input.start <= input.end && input.end <= len);
            assert!(
                input.end <= output.start || output.end <= input.start,
                "a step reads what it writes"
            );
        }
        // SAFETY: all ranges lie inside the block; the one that is written overlaps none that is
        // read, and `self` stays borrowed mutably as long as the slices live.
        unsafe {
            let slice = |r: &Range<usize>| std::slice::from_raw_parts(base.add(r.start), r.len());
            let inputs = inputs.iter().map(slice).collect();
            let output = std::slice::from_raw_parts_mut(base.add(output.start), output.len());
            (output, inputs)
        }
    }
}

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
        let mut arena = Arena::default();
        arena.reserve(10);
        arena.split(0..5, &[5..8, 4..6]);
    }
}
