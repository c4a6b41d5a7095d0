//! From coefficients to pixels, or to means of pixels, and from YCbCr to RGB.

use super::{COEFFICIENTS, SIDE, ZIGZAG};

/// Red, green and blue as JFIF defines them, in fixed point of 16 bits.
#[inline(always)]
pub fn rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
    let (y, cb, cr) = (i32::from(y), i32::from(cb) - 128, i32::from(cr) - 128);
    let red = y + ((91_881 * cr + HALF) >> 16);
    let green = y + ((-22_554 * cb - 46_802 * cr + HALF) >> 16);
    let blue = y + ((116_130 * cb + HALF) >> 16);
    [
        red.clamp(0, 255) as u8,
        green.clamp(0, 255) as u8,
        blue.clamp(0, 255) as u8,
    ]
}

const HALF: i32 = 1 << 15;

/// What each coefficient, in zigzag order, adds to the mean of each cell: `[64, rows, columns]`.
pub fn weights(quantization: &[u16; COEFFICIENTS], [columns, rows]: [usize; 2]) -> Vec<f32> {
    let (down, across) = (means(rows), means(columns));
    let mut all = Vec::with_capacity(COEFFICIENTS * rows * columns);
    for (&(v, u), &step) in ZIGZAG.iter().zip(quantization) {
        for down in &down[usize::from(v)][..rows] {
            let across = &across[usize::from(u)][..columns];
            all.extend(
                across
                    .iter()
                    .map(|across| (down * across * f64::from(step)) as f32),
            );
        }
    }
    all
}

/// The mean of each frequency's cosine in each of so many cells.
fn means(cells: usize) -> [[f64; SIDE]; SIDE] {
    let pixels = SIDE / cells;
    let mut means = [[0.0; SIDE]; SIDE];
    for (frequency, means) in means.iter_mut().enumerate() {
        let scale = if frequency == 0 { 0.5f64.sqrt() } else { 1.0 } / (2 * pixels) as f64;
        for pixel in 0..SIDE {
            let phase = ((2 * pixel + 1) * frequency) as f64 / (2 * SIDE) as f64;
            means[pixel / pixels] += (phase * std::f64::consts::PI).cos() * scale;
        }
    }
    means
}

/// How many coefficients tell much of so many cells. The even ones but the first have a mean of 0 over
/// four pixels, so that of two cells little comes after the fifth, the first of both directions.
pub fn needed([across, down]: [usize; 2]) -> usize {
    match across.max(down) {
        1 => 1,
        2 => 5,
        _ => COEFFICIENTS,
    }
}

/// Puts the means of a block's cells into its plane.
#[inline(always)]
pub fn store<const ACROSS: usize, const DOWN: usize>(
    sums: &[[f32; ACROSS]; DOWN],
    place: &mut [u8],
    stride: usize,
) -> Option<()> {
    for (row, sums) in sums.iter().enumerate() {
        let line = place.get_mut(row * stride..)?.first_chunk_mut::<ACROSS>()?;
        for (place, sum) in line.iter_mut().zip(sums) {
            // Rounded, and cut to what a byte holds.
            *place = (sum + 0.5) as u8;
        }
    }
    Some(())
}

/// Bits of the constants of the transform, and of what the first pass keeps of its fractions.
const CONSTANT: i32 = 13;
const KEPT: i32 = 2;

/// The pixels of a block; `plain` where it has its first coefficient alone.
#[inline(always)]
pub fn block_pixels(block: [[i32; SIDE]; SIDE], plain: bool) -> [[u8; SIDE]; SIDE] {
    if plain {
        let value = (block[0][0].wrapping_add(4) >> 3).saturating_add(128);
        [[value.clamp(0, 255) as u8; SIDE]; SIDE]
    } else {
        inverse(block)
    }
}

/// The pixels of a block of coefficients (rows of vertical frequencies), as libjpeg's accurate integer
/// transform gives them: columns first, then rows.
#[inline(always)]
fn inverse(mut block: [[i32; SIDE]; SIDE]) -> [[u8; SIDE]; SIDE] {
    pass(&mut block, CONSTANT - KEPT);
    let mut turned = [[0; SIDE]; SIDE];
    for row in 0..SIDE {
        for column in 0..SIDE {
            turned[column][row] = block[row][column];
        }
    }
    pass(&mut turned, CONSTANT + KEPT + 3);
    let mut pixels = [[0; SIDE]; SIDE];
    for row in 0..SIDE {
        for column in 0..SIDE {
            pixels[row][column] = turned[column][row].saturating_add(128).clamp(0, 255) as u8;
        }
    }
    pixels
}

/// The inverse transform of every column, rounded to `shift` bits less.
#[expect(
    clippy::needless_range_loop,
    reason = "columns become the lanes of vectors"
)]
#[inline(always)]
fn pass(block: &mut [[i32; SIDE]; SIDE], shift: i32) {
    let round = 1 << (shift - 1);
    for column in 0..SIDE {
        let at = |row: usize| block[row][column];
        let by = |value: i32, constant: i32| value.wrapping_mul(constant);
        // Even frequencies: a rotation by 3/8 of a right angle, and butterflies.
        let both = by(at(2).wrapping_add(at(6)), 4_433);
        let low = both.wrapping_add(by(at(2), 6_270));
        let high = both.wrapping_sub(by(at(6), 15_137));
        let sum = at(0).wrapping_add(at(4)).wrapping_shl(CONSTANT as u32);
        let difference = at(0).wrapping_sub(at(4)).wrapping_shl(CONSTANT as u32);
        let even = [
            sum.wrapping_add(low),
            difference.wrapping_add(high),
            difference.wrapping_sub(high),
            sum.wrapping_sub(low),
        ];
        // Odd frequencies: what pairs of them have in common is multiplied once.
        let (a, b, c, d) = (at(7), at(5), at(3), at(1));
        let all = by(a.wrapping_add(c).wrapping_add(b).wrapping_add(d), 9_633);
        let ad = by(a.wrapping_add(d), -7_373);
        let bc = by(b.wrapping_add(c), -20_995);
        let ac = by(a.wrapping_add(c), -16_069).wrapping_add(all);
        let bd = by(b.wrapping_add(d), -3_196).wrapping_add(all);
        let odd = [
            by(d, 12_299).wrapping_add(ad).wrapping_add(bd),
            by(c, 25_172).wrapping_add(bc).wrapping_add(ac),
            by(b, 16_819).wrapping_add(bc).wrapping_add(bd),
            by(a, 2_446).wrapping_add(ad).wrapping_add(ac),
        ];
        for row in 0..4 {
            let (even, odd) = (even[row].wrapping_add(round), odd[row]);
            block[row][column] = even.wrapping_add(odd) >> shift;
            block[SIDE - 1 - row][column] = even.wrapping_sub(odd) >> shift;
        }
    }
}
