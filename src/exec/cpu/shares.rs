//! Work on lines that follow each other, divided so that each thread goes on where it was.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Lines that are left, a share for each worker. A worker takes lines from the front of its share;
/// where that is empty, it takes the rear half of the largest that is left: lines next to each
/// other stay with one worker as long as possible, and nobody waits for a worker that is slow or
/// did not come.
pub(super) struct Shares(Vec<AtomicU64>);

/// A range as one word, so that it changes at once.
fn pack(range: Range<usize>) -> u64 {
    (range.start as u64) << 32 | range.end as u64
}

fn unpack(word: u64) -> Range<usize> {
    (word >> 32) as usize..(word & u64::from(u32::MAX)) as usize
}

impl Shares {
    /// Lines `0..lines` in equal shares.
    pub fn new(lines: usize, workers: usize) -> Self {
        let bound = |worker: usize| lines * worker / workers;
        let share = |worker| AtomicU64::new(pack(bound(worker)..bound(worker + 1)));
        Self((0..workers).map(share).collect())
    }

    /// The next lines for a worker: at most `most`, and none of the next group of `group` lines
    /// (an image's); None when nothing is left.
    pub fn next(&self, worker: usize, most: usize, group: usize) -> Option<Range<usize>> {
        loop {
            let own = &self.0[worker];
            let word = own.load(Ordering::Acquire);
            let share = unpack(word);
            if share.is_empty() {
                self.refill(worker)?;
                continue;
            }
            let rest = share.len().min(group - share.start % group);
            // Equal parts, rather than a small one in the end.
            let taken = rest.div_ceil(rest.div_ceil(most));
            let end = share.start + taken;
            if self.replace(own, word, end..share.end) {
                return Some(share.start..end);
            }
        }
    }

    /// Moves lines of another share to the worker's own, which is empty; None where all are.
    fn refill(&self, worker: usize) -> Option<()> {
        loop {
            let words = self
                .0
                .iter()
                .map(|share| (share, share.load(Ordering::Acquire)));
            let (share, word) = words.max_by_key(|(_, word)| unpack(*word).len())?;
            let lines = unpack(word);
            if lines.is_empty() {
                return None;
            }
            let middle = lines.start + lines.len() / 2;
            if self.replace(share, word, lines.start..middle) {
                self.0[worker].store(pack(middle..lines.end), Ordering::Release);
                return Some(());
            }
        }
    }

    fn replace(&self, share: &AtomicU64, old: u64, new: Range<usize>) -> bool {
        share
            .compare_exchange(old, pack(new), Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use rand::{RngExt, SeedableRng};

    use super::*;

    #[test]
    fn every_line_is_taken_once_whoever_comes() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
        for round in 0..300 {
            let workers = rng.random_range(1..=4);
            let group = rng.random_range(1..=20);
            let lines = group * rng.random_range(1..=5);
            let most = rng.random_range(1..=5);
            let shares = Shares::new(lines, workers);
            let taken: Vec<AtomicUsize> = (0..lines).map(|_| AtomicUsize::new(0)).collect();
            let work = |worker: usize| {
                while let Some(lines) = shares.next(worker, most, group) {
                    assert!(!lines.is_empty() && lines.len() <= most);
                    assert_eq!(lines.start / group, (lines.end - 1) / group);
                    for line in lines {
                        taken[line].fetch_add(1, Ordering::Relaxed);
                    }
                }
            };
            // Some never come, and the others do their lines.
            let present = if round % 2 == 0 { workers } else { 1 };
            std::thread::scope(|scope| {
                for worker in 0..present {
                    scope.spawn(move || work(worker));
                }
            });
            assert!(taken.iter().all(|t| t.load(Ordering::Relaxed) == 1));
        }
    }
}
