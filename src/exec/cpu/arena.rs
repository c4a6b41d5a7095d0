//! Where a plan's values lie in its one block of memory.

use std::ops::Range;

/// Index of a value in a plan.
pub(in crate::exec) type ValueId = usize;

/// Values are placed at multiples of a cache line.
const ALIGNMENT: usize = 64 / size_of::<f32>();

/// From the step that writes a value to the last that reads it, and its length for one image.
#[derive(Clone, Copy, Debug)]
pub(in crate::exec) struct Lifetime {
    pub first: usize,
    pub last: usize,
    pub len: usize,
}

/// Where a value lies, for a batch of one; a batch of N scales offset and length by N.
#[derive(Clone, Copy, Debug)]
pub(in crate::exec) struct Slot {
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
pub(in crate::exec) fn place(lifetimes: &[Lifetime]) -> Vec<Slot> {
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
pub(in crate::exec) fn per_image(slots: &[Slot]) -> usize {
    slots.iter().map(|s| s.offset + s.len).max().unwrap_or(0)
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
}
