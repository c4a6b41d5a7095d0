//! Progressive pictures: scan after scan tells more coefficients, or more bits of them, so that they are
//! kept until the last one. Of a picture that is made smaller, only those that matter are kept, and
//! scans that tell of no such are passed over.

use super::bits::{Bits, Code};
use super::transform::{block_pixels, needed, store, weights};
use super::{COEFFICIENTS, Component, SIDE, Scanned, ZIGZAG, by_cells};

/// What a scan tells of a component. Values lack their lowest `low` bits.
#[derive(Clone, Copy)]
pub enum Part {
    /// First coefficients.
    First { low: u32 },
    /// One more bit of the first coefficients.
    FirstBit { low: u32 },
    /// Coefficients of a band.
    Band { from: usize, to: usize, low: u32 },
    /// One more bit of a band's coefficients, and those that were zero without it.
    BandBit { from: usize, to: usize, low: u32 },
}

/// What is known of a component's coefficients.
pub struct Progress {
    /// Coefficients of a block that are kept, the first ones in zigzag order.
    kept: usize,
    /// `[blocks, kept]`.
    coefficients: Vec<i16>,
    /// For each block, a bit for each coefficient that is not zero.
    nonzero: Vec<u64>,
    /// The lowest bit that was told of each coefficient.
    told: [Option<u32>; COEFFICIENTS],
    /// What they are multiplied by, as it was when the first of them came.
    steps: Option<[u16; COEFFICIENTS]>,
}

impl Progress {
    /// Nothing known, of so many blocks.
    pub fn new(blocks: usize, cells: [usize; 2]) -> Self {
        let kept = needed(cells);
        Self {
            kept,
            coefficients: vec![0; blocks * kept],
            nonzero: vec![0; if kept > 1 { blocks } else { 0 }],
            told: [None; COEFFICIENTS],
            steps: None,
        }
    }

    /// The part that a scan's parameters stand for: the band, the bit above which values were told
    /// before (0 for none), and the bit down to which they are now. None where it does not follow on
    /// what was told.
    pub fn part(&mut self, [from, to, bits]: [u8; 3], steps: &[u16; COEFFICIENTS]) -> Option<Part> {
        let (from, to) = (usize::from(from), usize::from(to));
        let (high, low) = (u32::from(bits >> 4), u32::from(bits & 15));
        let before = (high > 0).then_some(high);
        if from > to || to >= COEFFICIENTS || (from == 0 && to > 0) || low > 13 {
            return None;
        }
        if high > 0 && high != low + 1 {
            return None;
        }
        for told in &mut self.told[from..=to] {
            if *told != before {
                return None;
            }
            *told = Some(low);
        }
        self.steps.get_or_insert(*steps);
        Some(match (from, before) {
            (0, None) => Part::First { low },
            (0, Some(_)) => Part::FirstBit { low },
            (_, None) => Part::Band { from, to, low },
            (_, Some(_)) => Part::BandBit { from, to, low },
        })
    }

    /// Whether a part tells of nothing that is kept, nor of what has to be known to read on.
    pub fn passes_over(&self, part: Part) -> bool {
        self.kept == 1 && matches!(part, Part::Band { .. } | Part::BandBit { .. })
    }
}

impl Bits<'_> {
    /// Reads a block's part of a scan.
    #[inline(always)]
    pub(super) fn part(
        &mut self,
        part: Part,
        scanned: &mut Scanned,
        component: &mut Component,
        [column, row]: [usize; 2],
    ) -> Option<()> {
        let block = row * component.blocks[0] + column;
        let progress = component.progress.as_mut()?;
        let kept = progress.kept;
        let place = progress
            .coefficients
            .get_mut(block * kept..(block + 1) * kept)?;
        match part {
            Part::First { low } => place[0] = (self.first(scanned)? << low) as i16,
            Part::FirstBit { low } => place[0] |= i16::from(self.bit()?) << low,
            Part::Band { from, to, low } => {
                if scanned.empty > 0 {
                    scanned.empty -= 1;
                    return Some(());
                }
                let nonzero = progress.nonzero.get_mut(block)?;
                self.band(scanned, from, to, |at, value| {
                    *nonzero |= 1 << at;
                    if let Some(place) = place.get_mut(at) {
                        *place = (value << low) as i16;
                    }
                })?;
            }
            Part::BandBit { from, to, low } => {
                let nonzero = progress.nonzero.get_mut(block)?;
                self.band_bit(scanned, [from, to], 1 << low, place, nonzero)?;
            }
        }
        Some(())
    }

    /// Hands on the coefficients of a block's band.
    #[inline(always)]
    fn band(
        &mut self,
        scanned: &mut Scanned,
        from: usize,
        to: usize,
        mut each: impl FnMut(usize, i32),
    ) -> Option<()> {
        let code = scanned.ac?;
        let mut at = from;
        while at <= to {
            self.refill()?;
            let symbol = self.symbol(code)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            match (run, size) {
                (15, 0) => at += 16,
                (run, 0) => {
                    scanned.empty = self.blocks(run as u32) - 1;
                    return Some(());
                }
                _ => {
                    at += run;
                    if at > to {
                        return None;
                    }
                    each(at, self.value(size));
                    at += 1;
                }
            }
        }
        (at == to + 1).then_some(())
    }

    /// So many blocks, this one with them, have nothing more in the band.
    #[inline(always)]
    fn blocks(&mut self, bits: u32) -> u32 {
        if bits == 0 {
            return 1;
        }
        let more = (self.next_bits() >> (64 - bits)) as u32;
        self.skip(bits);
        (1 << bits) + more
    }

    /// One more bit of a band. Those that are not zero have theirs between the symbols of the others.
    #[inline(always)]
    fn band_bit(
        &mut self,
        scanned: &mut Scanned,
        [from, to]: [usize; 2],
        one: i16,
        place: &mut [i16],
        nonzero: &mut u64,
    ) -> Option<()> {
        let code: &Code = scanned.ac?;
        let mut at = from;
        if scanned.empty == 0 {
            while at <= to {
                self.refill()?;
                let symbol = self.symbol(code)?;
                let (mut run, size) = (symbol >> 4, symbol & 15);
                let mut new = 0;
                match (run, size) {
                    (15, 0) => {}
                    (run, 0) => {
                        scanned.empty = self.blocks(u32::from(run));
                        break;
                    }
                    (_, 1) => new = if self.bit()? { one } else { -one },
                    _ => return None,
                }
                while at <= to {
                    if *nonzero >> at & 1 == 1 {
                        self.refine(place.get_mut(at), one)?;
                    } else if run == 0 {
                        break;
                    } else {
                        run -= 1;
                    }
                    at += 1;
                }
                if new != 0 {
                    if at > to {
                        return None;
                    }
                    *nonzero |= 1 << at;
                    if let Some(place) = place.get_mut(at) {
                        *place = new;
                    }
                }
                at += 1;
            }
        }
        if scanned.empty > 0 {
            scanned.empty -= 1;
            while at <= to {
                if *nonzero >> at & 1 == 1 {
                    self.refine(place.get_mut(at), one)?;
                }
                at += 1;
            }
        }
        Some(())
    }

    #[inline(always)]
    fn refine(&mut self, place: Option<&mut i16>, one: i16) -> Option<()> {
        let more = self.bit()?;
        if let Some(place) = place
            && more
        {
            *place = place.wrapping_add(if *place < 0 { -one } else { one });
        }
        Some(())
    }
}

impl Component {
    /// Makes the plane of what was told. None where something is still missing: libjpeg then guesses.
    #[inline(always)]
    pub(super) fn resolve(&mut self, whole: bool) -> Option<()> {
        let Some(progress) = &self.progress else {
            return Some(());
        };
        if progress.told != [Some(0); COEFFICIENTS] {
            return None;
        }
        let steps = progress.steps.as_ref()?;
        let weights = if whole {
            Vec::new()
        } else {
            weights(steps, self.cells)
        };
        let [across, down] = self.cells;
        let stride = self.stride();
        for (block, values) in progress
            .coefficients
            .chunks_exact(progress.kept)
            .enumerate()
        {
            let (row, column) = (block / self.blocks[0], block % self.blocks[0]);
            let Some(start) = self.place([column, row]) else {
                continue;
            };
            let place = self.plane.get_mut(start..)?;
            if whole {
                pixels(values, steps, place, stride)?;
            } else {
                by_cells!([across, down], means(values, &weights, place, stride))?;
            }
        }
        Some(())
    }
}

#[inline(always)]
fn pixels(
    values: &[i16],
    steps: &[u16; COEFFICIENTS],
    place: &mut [u8],
    stride: usize,
) -> Option<()> {
    let mut block = [[0; SIDE]; SIDE];
    for ((&value, &step), (row, column)) in values.iter().zip(steps).zip(ZIGZAG) {
        block[usize::from(row)][usize::from(column)] = i32::from(value) * i32::from(step);
    }
    let plain = values.iter().skip(1).all(|&value| value == 0);
    for (row, pixels) in block_pixels(block, plain).iter().enumerate() {
        *place.get_mut(row * stride..)?.first_chunk_mut()? = *pixels;
    }
    Some(())
}

#[inline(always)]
fn means<const ACROSS: usize, const DOWN: usize>(
    values: &[i16],
    weights: &[f32],
    place: &mut [u8],
    stride: usize,
) -> Option<()> {
    let (weights, _) = weights.as_chunks::<ACROSS>();
    let (weights, _) = weights.as_chunks::<DOWN>();
    let mut sums = [[128.0; ACROSS]; DOWN];
    for (&value, weights) in values.iter().zip(weights) {
        if value != 0 {
            for row in 0..DOWN {
                for column in 0..ACROSS {
                    sums[row][column] += weights[row][column] * f32::from(value);
                }
            }
        }
    }
    store(&sums, place, stride)
}
