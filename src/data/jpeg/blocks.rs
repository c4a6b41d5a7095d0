//! Blocks of a sequential scan, as pixels or as the means of their cells.

use super::bits::Bits;
use super::transform::{block_pixels, needed, store};
use super::{COEFFICIENTS, Component, SIDE, Scanned, ZIGZAG, by_cells};

impl Bits<'_> {
    /// Reads the block at that place of a component.
    #[inline(always)]
    pub(super) fn block(
        &mut self,
        scanned: &mut Scanned,
        component: &mut Component,
        place: [usize; 2],
    ) -> Option<()> {
        if let Some(part) = scanned.part {
            return self.part(part, scanned, component, place);
        }
        let Some(start) = component.place(place) else {
            self.first(scanned)?;
            return self.step_over(scanned.ac?, 1);
        };
        let [across, down] = component.cells;
        let stride = component.stride();
        let place = component.plane.get_mut(start..)?;
        if let Some(steps) = scanned.steps {
            return self.pixels(scanned, steps, place, stride);
        }
        by_cells!([across, down], cells(self, scanned, place, stride))
    }

    /// The first coefficient of a block, by its difference from the one before.
    #[inline(always)]
    pub(super) fn first(&mut self, scanned: &mut Scanned) -> Option<i32> {
        self.refill()?;
        let difference = self.difference(scanned.dc?)?;
        scanned.before = scanned.before.checked_add(difference)?;
        Some(scanned.before)
    }

    /// Reads a block as its pixels.
    #[inline(always)]
    fn pixels(
        &mut self,
        scanned: &mut Scanned,
        steps: &[u16; COEFFICIENTS],
        place: &mut [u8],
        stride: usize,
    ) -> Option<()> {
        let mut block = [[0; SIDE]; SIDE];
        block[0][0] = self.first(scanned)?.wrapping_mul(i32::from(steps[0]));
        let mut plain = true;
        let at = self.coefficients(scanned.ac?, 1, COEFFICIENTS - 1, |at, value| {
            let (row, column) = ZIGZAG[at];
            block[usize::from(row)][usize::from(column)] = value.wrapping_mul(i32::from(steps[at]));
            plain = false;
        })?;
        if at > COEFFICIENTS {
            return None;
        }
        let pixels = block_pixels(block, plain);
        for (row, pixels) in pixels.iter().enumerate() {
            *place.get_mut(row * stride..)?.first_chunk_mut()? = *pixels;
        }
        Some(())
    }
}

/// Reads a block as the means of its cells.
#[inline(always)]
fn cells<const ACROSS: usize, const DOWN: usize>(
    bits: &mut Bits,
    scanned: &mut Scanned,
    place: &mut [u8],
    stride: usize,
) -> Option<()> {
    let first = bits.first(scanned)? as f32;
    let (weights, _) = scanned.weights.as_chunks::<ACROSS>();
    let (weights, _) = weights.as_chunks::<DOWN>();
    let weights: &[[[f32; ACROSS]; DOWN]; COEFFICIENTS] = weights.first_chunk()?;
    let last = needed([ACROSS, DOWN]) - 1;
    // Loops rather than maps over arrays, which are not always made part of the function that
    // is compiled for the machine.
    let mut sums = [[128.0; ACROSS]; DOWN];
    for row in 0..DOWN {
        for column in 0..ACROSS {
            sums[row][column] += weights[0][row][column] * first;
        }
    }
    let code = scanned.ac?;
    let at = bits.coefficients(code, 1, last, |at, value| {
        for row in 0..DOWN {
            for column in 0..ACROSS {
                sums[row][column] += weights[at][row][column] * value as f32;
            }
        }
    })?;
    bits.step_over(code, at)?;
    store(&sums, place, stride)
}
