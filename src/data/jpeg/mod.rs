//! JPEGs, or the windows of them that are needed, at their size or at a half, a quarter or an eighth of
//! it.
//!
//! At its size, every pixel is the one that libjpeg gives, and so Pillow and torchvision: its inverse
//! transform in 13 bits after Loeffler, Ligtenberg and Moschytz (ICASSP 1989), its triangle filter where
//! chrominance is stored at half the size, its rounding of colours.
//!
//! A photo of 12 million pixels is mostly thrown away when it is made 224 wide. Its blocks of 8 x 8
//! pixels are stored as cosines, and the mean of a cell of pixels is a weighted sum of a block's
//! coefficients; at an eighth it is the first coefficient alone. So only the coefficients that matter
//! are taken, weighted and added up, and the rest of the block is stepped over, several symbols of its
//! Huffman code at once. What is left is the cost of the code itself: a third of that of a whole
//! decode. Chrominance that is stored at half the size is read at twice the scale, so that all planes
//! come out alike. The cells are true means, as the antialiased resizing that follows would take them.
//!
//! Blocks that lie outside the window are stepped over too: of a photo of 4 x 3, the square that a
//! network sees is little more than half.
//!
//! Read are baseline, extended and progressive Huffman-coded JPEGs of 8 bits, grey or YCbCr, which is
//! nearly all that there are. Of any other file, and of one in which anything is odd, nothing is said
//! here: it is for another decoder to read it or to tell what is wrong with it. The format is ITU-T
//! T.81.

mod bits;
mod blocks;
mod progressive;
mod transform;

use std::ops::Range;

use super::Rgb;
use crate::kernels::Isa;
use bits::{Bits, Code, Entropy, LONGEST};
use progressive::{Part, Progress};
use transform::{rgb, weights};

/// Pixels of a block's side.
const SIDE: usize = 8;
/// Pixels beyond a window that are read too, since samples of chrominance at half the size are smoothed
/// with their neighbours, and since what is as narrow as two of them is not.
const SEEN_BEYOND: usize = SIDE;
/// Coefficients of a block.
const COEFFICIENTS: usize = SIDE * SIDE;
/// Where the n-th coefficient of a block lies: row and column.
const ZIGZAG: [(u8, u8); COEFFICIENTS] = zigzag();

const fn zigzag() -> [(u8, u8); COEFFICIENTS] {
    let mut order = [(0, 0); COEFFICIENTS];
    let (mut at, mut diagonal) = (0, 0);
    while diagonal < 2 * SIDE - 1 {
        let mut step = 0;
        while step <= diagonal {
            let (up, down) = (diagonal - step, step);
            let (row, column) = if diagonal % 2 == 0 {
                (up, down)
            } else {
                (down, up)
            };
            if row < SIDE && column < SIDE {
                order[at] = (row as u8, column as u8);
                at += 1;
            }
            step += 1;
        }
        diagonal += 1;
    }
    order
}

/// Calls a function for the cells that a block becomes, of the shapes that occur.
macro_rules! by_cells {
    ($cells:expr, $function:ident($($argument:expr),*)) => {
        match $cells {
            [1, 1] => $function::<1, 1>($($argument),*),
            [1, 2] => $function::<1, 2>($($argument),*),
            [2, 1] => $function::<2, 1>($($argument),*),
            [2, 2] => $function::<2, 2>($($argument),*),
            [2, 4] => $function::<2, 4>($($argument),*),
            [4, 2] => $function::<4, 2>($($argument),*),
            [4, 4] => $function::<4, 4>($($argument),*),
            [4, 8] => $function::<4, 8>($($argument),*),
            [8, 4] => $function::<8, 4>($($argument),*),
            [8, 8] => $function::<8, 8>($($argument),*),
            _ => None,
        }
    };
}
use by_cells;

/// The picture, made smaller by 2, 4 or 8 where `by` is not 1, each pixel then the mean of `by` x `by`; a
/// part of one at the right and the bottom edge counts as one. Of it the columns and rows of `window`.
/// None where its width and height are not `size`, or another decoder has to look at the file.
pub(super) fn read(
    bytes: &[u8],
    size: [usize; 2],
    by: usize,
    window: [Range<usize>; 2],
) -> Option<Rgb> {
    let mut file = File {
        bytes,
        size,
        by,
        window,
        ..File::default()
    };
    file.segments()?;
    Isa::detect().compiled(
        #[inline(always)]
        || file.finish(),
    )
}

#[derive(Default)]
struct File<'a> {
    bytes: &'a [u8],
    size: [usize; 2],
    by: usize,
    window: [Range<usize>; 2],
    quantization: [Option<[u16; COEFFICIENTS]>; 4],
    dc: [Option<Box<Code>>; 4],
    ac: [Option<Box<Code>>; 4],
    /// MCUs between restart markers; 0 for none.
    restart: usize,
    frame: Option<Frame>,
}

struct Frame {
    width: usize,
    height: usize,
    /// Largest sampling factors, horizontal and vertical.
    largest: [usize; 2],
    /// The pixels, at the scale that is read, that the planes hold: whole MCUs, or up to an edge.
    held: [Range<usize>; 2],
    components: Vec<Component>,
}

struct Component {
    id: u8,
    /// Sampling factors.
    sampling: [usize; 2],
    quantization: usize,
    /// Blocks across and down, in whole MCUs, and those that the plane holds.
    blocks: [usize; 2],
    held: [Range<usize>; 2],
    /// Cells that a block becomes; at the picture's size, its pixels.
    cells: [usize; 2],
    /// At the picture's size: how many pixels of it lie side by side for one of the plane, and how many
    /// of the plane count.
    spread: [usize; 2],
    size: [usize; 2],
    plane: Vec<u8>,
    read: bool,
    /// Of a progressive picture.
    progress: Option<Progress>,
}

impl Component {
    /// Samples of a row of the plane.
    #[inline(always)]
    fn stride(&self) -> usize {
        self.held[0].len() * self.cells[0]
    }

    /// Where the cells of a block begin in the plane; None where it does not hold it.
    #[inline(always)]
    fn place(&self, [column, row]: [usize; 2]) -> Option<usize> {
        let inside = self.held[0].contains(&column) && self.held[1].contains(&row);
        inside.then(|| {
            let [across, down] = self.cells;
            let (column, row) = (column - self.held[0].start, row - self.held[1].start);
            row * down * self.stride() + column * across
        })
    }

    /// The plane's part of a row of the pixels that are held; `sums` is for its own use.
    #[inline(always)]
    fn row(&self, y: usize, row: &mut [u8], sums: &mut Vec<i32>) -> Option<()> {
        let stride = self.stride();
        let line = |y: usize| self.plane.get(y * stride..(y + 1) * stride);
        let [across, down] = self.spread;
        let [width, height] = self.size;
        let own = line(y / down)?;
        if self.spread == [1, 1] {
            row.copy_from_slice(own.get(..row.len())?);
            return Some(());
        }
        // Three quarters of each value come from the nearer one, across and down. All is rounded once,
        // in turn up and down; what is two wide is only repeated.
        sums.clear();
        let (shift, first, second) = if down == 1 || (across == 2 && width <= 2) {
            sums.extend(own.iter().take(width).map(|&v| i32::from(v)));
            (2, 1, 2)
        } else {
            let near = match y % 2 {
                0 => (y / 2).saturating_sub(1),
                _ => (y / 2 + 1).min(height - 1),
            };
            let pairs = own.iter().zip(line(near)?).take(width);
            sums.extend(pairs.map(|(&own, &near)| 3 * i32::from(own) + i32::from(near)));
            (4, 8, 7)
        };
        if across == 1 {
            let round = 1 + (y % 2) as i32;
            for (out, sum) in row.iter_mut().zip(&*sums) {
                *out = ((sum + round) >> 2) as u8;
            }
            return Some(());
        }
        if width <= 2 {
            for (pair, &sum) in row.chunks_mut(2).zip(&*sums) {
                pair.fill(sum as u8);
            }
            return Some(());
        }
        let mut pairs = vec![[0; 2]; width];
        for (at, three) in sums.windows(3).enumerate() {
            pairs[at + 1] = [
                ((3 * three[1] + three[0] + first) >> shift) as u8,
                ((3 * three[1] + three[2] + second) >> shift) as u8,
            ];
        }
        let [start, next] = [sums[0], sums[1]];
        let [before, end] = [sums[width - 2], sums[width - 1]];
        pairs[0] = [
            ((4 * start + first) >> shift) as u8,
            ((3 * start + next + second) >> shift) as u8,
        ];
        pairs[width - 1] = [
            ((3 * end + before + first) >> shift) as u8,
            ((4 * end + second) >> shift) as u8,
        ];
        row.copy_from_slice(pairs.as_flattened().get(..row.len())?);
        Some(())
    }
}

/// A component while a scan is read.
struct Scanned<'a> {
    component: usize,
    /// What its coefficients are multiplied by, where the picture is read whole.
    steps: Option<&'a [u16; COEFFICIENTS]>,
    /// What the scan tells of a progressive picture.
    part: Option<Part>,
    /// The codes of first and of other coefficients, where there are such.
    dc: Option<&'a Code>,
    ac: Option<&'a Code>,
    /// For each coefficient, what one of it adds to each cell: `[64, cells]`.
    weights: Vec<f32>,
    /// The first coefficient of the block before.
    before: i32,
    /// Blocks to come that have nothing in the band.
    empty: u32,
}

fn pair(bytes: &[u8], at: usize) -> Option<usize> {
    let pair = bytes.get(at..at + 2)?;
    Some(usize::from(u16::from_be_bytes([pair[0], pair[1]])))
}

impl File<'_> {
    /// Reads all segments, to the end marker.
    fn segments(&mut self) -> Option<()> {
        let bytes = self.bytes;
        let mut at = 2;
        if bytes.get(..2)? != [0xff, 0xd8] {
            return None;
        }
        loop {
            if *bytes.get(at)? != 0xff {
                return None;
            }
            let marker = *bytes.get(at + 1)?;
            if marker == 0xff {
                at += 1;
                continue;
            }
            if marker == 0xd9 {
                return Some(());
            }
            let length = pair(bytes, at + 2)?;
            let body = bytes.get(at + 4..at + 2 + length)?;
            at += 2 + length;
            match marker {
                0xc0 | 0xc1 => self.start_of_frame(body, false)?,
                0xc2 => self.start_of_frame(body, true)?,
                0xc4 => self.huffman(body)?,
                0xdb => self.quantization(body)?,
                0xdd => self.restart = pair(body, 0)?,
                0xda => at = self.scan(body, at)?,
                // Adobe's segment tells how colours are coded: 1 is YCbCr.
                0xee if body.starts_with(b"Adobe") && *body.get(11)? != 1 => return None,
                0xe0..=0xef | 0xfe => {}
                _ => return None,
            }
        }
    }

    fn start_of_frame(&mut self, body: &[u8], progressive: bool) -> Option<()> {
        let &[8, _, _, _, _, count, ref rest @ ..] = body else {
            return None;
        };
        let (height, width) = (pair(body, 1)?, pair(body, 3)?);
        let (specifications, rest) = rest.as_chunks::<3>();
        let known = [1, 3].contains(&count) && specifications.len() == usize::from(count);
        if self.frame.is_some() || !known || !rest.is_empty() || [width, height] != self.size {
            return None;
        }
        let sampling = |byte: u8| match count {
            // A single plane has no other to be sampled against.
            1 => [1, 1],
            _ => [usize::from(byte >> 4), usize::from(byte & 15)],
        };
        let factors = specifications.iter().map(|s| sampling(s[1]));
        let largest = factors.fold([1, 1], |[h, v], [x, y]| [h.max(x), v.max(y)]);
        let mcus = [
            width.div_ceil(SIDE * largest[0]),
            height.div_ceil(SIDE * largest[1]),
        ];
        let mut held = [0..0, 0..0];
        let mut held_mcus = [0..0, 0..0];
        for axis in 0..2 {
            let side = SIDE * largest[axis] / self.by;
            let Range { start, end } = self.window[axis];
            let from = start.saturating_sub(SEEN_BEYOND) / side;
            let to = (end + SEEN_BEYOND).div_ceil(side).min(mcus[axis]);
            let edge = [width, height][axis].div_ceil(self.by);
            if from >= to || start >= end || end > edge {
                return None;
            }
            held_mcus[axis] = from..to;
            held[axis] = from * side..edge.min(to * side);
        }
        let component = |&[id, factors, quantization]: &[u8; 3]| {
            let sampling = sampling(factors);
            let (mut cells, mut spread, mut size) = ([0; 2], [1; 2], [0; 2]);
            let mut held = held_mcus.clone();
            for axis in 0..2 {
                let (most, own) = (SIDE * largest[axis], sampling[axis] * self.by);
                if own == 0 || sampling[axis] > 4 || most % own != 0 {
                    return None;
                }
                cells[axis] = most / own;
                if self.by == 1 {
                    spread[axis] = cells[axis] / SIDE;
                    cells[axis] = SIDE;
                }
                let Range { start, end } = &mut held[axis];
                (*start, *end) = (*start * sampling[axis], *end * sampling[axis]);
                size[axis] = ([width, height][axis] * sampling[axis])
                    .div_ceil(largest[axis])
                    .min(*end * SIDE)
                    .checked_sub(*start * SIDE)?;
                if spread[axis] > 2 {
                    return None;
                }
                // Of a component at a quarter, a cell at half the size were more than a pixel.
                if ![1, 2, 4, 8].contains(&cells[axis]) {
                    return None;
                }
            }
            let blocks = [mcus[0] * sampling[0], mcus[1] * sampling[1]];
            Some(Component {
                id,
                sampling,
                quantization: usize::from(quantization),
                blocks,
                cells,
                spread,
                size,
                plane: vec![0; held[0].len() * cells[0] * held[1].len() * cells[1]],
                held,
                read: false,
                progress: progressive.then(|| Progress::new(blocks[0] * blocks[1], cells)),
            })
        };
        let components: Vec<Component> = specifications
            .iter()
            .map(component)
            .collect::<Option<_>>()?;
        // Without Adobe's segment, such names say that it is RGB.
        if components.iter().map(|c| c.id).eq(*b"RGB") {
            return None;
        }
        self.frame = Some(Frame {
            width,
            height,
            largest,
            held,
            components,
        });
        Some(())
    }

    fn quantization(&mut self, mut body: &[u8]) -> Option<()> {
        while let Some((&head, rest)) = body.split_first() {
            let wide = match head >> 4 {
                0 => 1,
                1 => 2,
                _ => return None,
            };
            let (values, rest) = rest.split_at_checked(COEFFICIENTS * wide)?;
            let mut table = [0; COEFFICIENTS];
            for (entry, value) in table.iter_mut().zip(values.chunks_exact(wide)) {
                *entry = value
                    .iter()
                    .fold(0, |sum, &byte| sum << 8 | u16::from(byte));
            }
            *self.quantization.get_mut(usize::from(head & 15))? = Some(table);
            body = rest;
        }
        Some(())
    }

    fn huffman(&mut self, mut body: &[u8]) -> Option<()> {
        while let Some((&head, rest)) = body.split_first() {
            let (counts, rest) = rest.split_first_chunk::<LONGEST>()?;
            let symbols = counts.iter().map(|&count| usize::from(count)).sum();
            let (symbols, rest) = rest.split_at_checked(symbols)?;
            let code = Some(Box::new(Code::new(counts, symbols)?));
            let tables = match head >> 4 {
                0 => &mut self.dc,
                1 => &mut self.ac,
                _ => return None,
            };
            *tables.get_mut(usize::from(head & 15))? = code;
            body = rest;
        }
        Some(())
    }

    /// Reads a scan whose data begin at `at`, and gives where they end.
    fn scan(&mut self, body: &[u8], at: usize) -> Option<usize> {
        let (&count, rest) = body.split_first()?;
        let (chosen, rest) = rest.split_at_checked(2 * usize::from(count))?;
        let (chosen, _) = chosen.as_chunks::<2>();
        let frame = self.frame.as_mut()?;
        let parameters: [u8; 3] = rest.try_into().ok()?;
        if chosen.is_empty() {
            return None;
        }
        let mut scanned = Vec::with_capacity(chosen.len());
        for &[id, tables] in chosen {
            let component = frame.components.iter().position(|c| c.id == id)?;
            let plane = &mut frame.components[component];
            let table = self.quantization.get(plane.quantization)?.as_ref()?;
            let before = std::mem::replace(&mut plane.read, true);
            let part = match &mut plane.progress {
                Some(progress) => {
                    let part = progress.part(parameters, table)?;
                    if chosen.len() > 1 && parameters[0] > 0 {
                        return None;
                    }
                    if progress.passes_over(part) {
                        return Entropy::end_of(self.bytes, at);
                    }
                    Some(part)
                }
                // All coefficients, with all of their bits, and once.
                None if parameters == [0, 63, 0] && !before => None,
                None => return None,
            };
            let whole = self.by == 1;
            scanned.push(Scanned {
                component,
                steps: whole.then_some(table),
                part,
                dc: self.dc.get(usize::from(tables >> 4))?.as_deref(),
                ac: self.ac.get(usize::from(tables & 15))?.as_deref(),
                weights: if whole || part.is_some() {
                    Vec::new()
                } else {
                    weights(table, plane.cells)
                },
                before: 0,
                empty: 0,
            });
        }
        let data = Entropy::new(self.bytes, at)?;
        // A scan of one component has a block for an MCU, and none that lie outside the picture.
        let (mcus, alone) = match scanned.as_slice() {
            [one] => {
                let sampling = frame.components[one.component].sampling;
                let blocks = |axis: usize, size: usize| {
                    (size * sampling[axis])
                        .div_ceil(frame.largest[axis])
                        .div_ceil(SIDE)
                };
                ([blocks(0, frame.width), blocks(1, frame.height)], true)
            }
            _ => {
                let whole = |axis: usize, size: usize| size.div_ceil(SIDE * frame.largest[axis]);
                ([whole(0, frame.width), whole(1, frame.height)], false)
            }
        };
        let restart = self.restart;
        let mut scan = Scan {
            components: &mut frame.components,
            scanned,
            mcus,
            alone,
            restart,
        };
        // Compiled for what the machine has: it is a quarter faster with its shifts and vectors.
        Isa::detect().compiled(
            #[inline(always)]
            || scan.blocks(&data),
        )?;
        Some(data.end)
    }

    /// The window of the planes as one picture.
    #[inline(always)]
    fn finish(self) -> Option<Rgb> {
        let mut frame = self.frame?;
        for component in &mut frame.components {
            component.resolve(self.by == 1)?;
        }
        if !frame.components.iter().all(|component| component.read) {
            return None;
        }
        let [columns, rows] = self.window;
        let (width, height) = (columns.len(), rows.len());
        let [held_columns, held_rows] = frame.held;
        let first = columns.start - held_columns.start;
        let shown = first..first + width;
        let mut pixels = vec![0; width * height * 3];
        let mut planes = vec![vec![0; held_columns.len()]; frame.components.len()];
        let mut sums = Vec::new();
        for (y, line) in rows.zip(pixels.chunks_exact_mut(width * 3)) {
            for (component, row) in frame.components.iter().zip(&mut planes) {
                component.row(y - held_rows.start, row, &mut sums)?;
            }
            let (line, _) = line.as_chunks_mut::<3>();
            match planes.as_slice() {
                [grey] => {
                    for (pixel, &value) in line.iter_mut().zip(&grey[shown.clone()]) {
                        *pixel = [value; 3];
                    }
                }
                [y, cb, cr] => {
                    let [y, cb, cr] = [y, cb, cr].map(|row| &row[shown.clone()]);
                    let values = y.iter().zip(cb).zip(cr);
                    for (pixel, ((&y, &cb), &cr)) in line.iter_mut().zip(values) {
                        *pixel = rgb(y, cb, cr);
                    }
                }
                _ => return None,
            }
        }
        Some(Rgb {
            width,
            height,
            pixels,
        })
    }
}

/// A scan to be read.
struct Scan<'a> {
    components: &'a mut [Component],
    scanned: Vec<Scanned<'a>>,
    /// MCUs across and down.
    mcus: [usize; 2],
    /// A block is an MCU.
    alone: bool,
    restart: usize,
}

impl Scan<'_> {
    #[inline(always)]
    fn blocks(&mut self, data: &Entropy) -> Option<()> {
        let mut intervals = data.intervals.iter();
        let mut left = 0;
        let mut bits = Bits::default();
        for row in 0..self.mcus[1] {
            for column in 0..self.mcus[0] {
                if left == 0 {
                    if bits.position() > bits.end * 8 {
                        return None;
                    }
                    bits = Bits::new(&data.bytes, intervals.next()?);
                    for scanned in &mut self.scanned {
                        (scanned.before, scanned.empty) = (0, 0);
                    }
                    left = match self.restart {
                        0 => usize::MAX,
                        mcus => mcus,
                    };
                }
                left -= 1;
                for scanned in &mut self.scanned {
                    let component = &mut self.components[scanned.component];
                    let [across, down] = if self.alone {
                        [1, 1]
                    } else {
                        component.sampling
                    };
                    for y in 0..down {
                        for x in 0..across {
                            let block = [column * across + x, row * down + y];
                            bits.block(scanned, component, block)?;
                        }
                    }
                }
            }
        }
        let whole = bits.position() <= bits.end * 8 && intervals.next().is_none();
        whole.then_some(())
    }
}
