//! Pictures kept in memory, so that later epochs need not decode them again. What is kept never
//! changes what comes out: an image that is prepared in the same way each time is kept as it was
//! cropped, any other as it was decoded.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::Rgb;

/// Bytes that several caches may take together.
#[derive(Clone, Debug, Default)]
pub struct CacheLimit(Arc<AtomicU64>);

impl CacheLimit {
    pub fn new(bytes: u64) -> Self {
        Self(Arc::new(AtomicU64::new(bytes)))
    }

    /// Bytes that are still free.
    pub fn left(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether so many bytes were free; then they are taken.
    fn take(&self, bytes: u64) -> bool {
        let less = |left: u64| left.checked_sub(bytes);
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
        taken.is_ok()
    }
}

/// What is kept of some samples, each at most once.
#[derive(Clone)]
pub struct Cache {
    slots: Arc<[OnceLock<Kept>]>,
    limit: CacheLimit,
}

/// A picture in memory.
#[derive(Clone)]
pub(super) enum Kept {
    /// As it was decoded.
    Whole(Arc<Rgb>),
    /// Resized and cropped.
    Cropped(Arc<[u8]>),
}

impl Kept {
    fn bytes(&self) -> u64 {
        // With what surrounds the pixels.
        64 + match self {
            Kept::Whole(image) => image.pixels.len() as u64,
            Kept::Cropped(pixels) => pixels.len() as u64,
        }
    }
}

impl Cache {
    /// Empty, for so many samples.
    pub fn new(samples: usize, limit: CacheLimit) -> Self {
        Self {
            slots: (0..samples).map(|_| OnceLock::new()).collect(),
            limit,
        }
    }

    pub(super) fn get(&self, sample: usize) -> Option<&Kept> {
        self.slots.get(sample)?.get()
    }

    /// Keeps a picture, where there is room and none of the sample is kept.
    pub(super) fn keep(&self, sample: usize, kept: &Kept) {
        if let Some(slot) = self.slots.get(sample)
            && slot.get().is_none()
            && self.limit.take(kept.bytes())
        {
            let _ = slot.set(kept.clone());
        }
    }
}

/// A quarter of the memory that this process may still take, or 1 GiB where that is not known.
pub fn default_cache_bytes() -> u64 {
    free_memory().map_or(1 << 30, |free| free / 4)
}

/// What the system has free, or the control group where that is less.
fn free_memory() -> Option<u64> {
    let number = |path: &str| -> Option<u64> { read(path)?.trim().parse().ok() };
    let line = read("/proc/meminfo")?;
    let line = line.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    let group = number("/sys/fs/cgroup/memory.max")
        .map(|most| most.saturating_sub(number("/sys/fs/cgroup/memory.current").unwrap_or(0)));
    Some((kib << 10).min(group.unwrap_or(u64::MAX)))
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_keeps_what_fits() {
        let limit = CacheLimit::new(400);
        let caches = [2, 1].map(|samples| Cache::new(samples, limit.clone()));
        let kept = Kept::Cropped(vec![7; 100].into());
        caches[0].keep(0, &kept);
        caches[0].keep(0, &kept);
        assert_eq!(limit.left(), 400 - 164);
        caches[1].keep(0, &kept);
        caches[0].keep(1, &kept);
        assert_eq!(limit.left(), 400 - 2 * 164);
        let kept = [caches[0].get(0), caches[0].get(1), caches[1].get(0)];
        assert_eq!(kept.map(|k| k.is_some()), [true, false, true]);
        assert!(caches[1].get(5).is_none());
    }

    #[test]
    fn the_default_is_a_part_of_what_is_free() {
        assert!(default_cache_bytes() > 1 << 20);
    }
}
