//! JPEGs, whole or read at a half, a quarter or an eighth of their size.
//!
//! Whole, every pixel is the one that libjpeg gives, and so Pillow and torchvision: its inverse
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
//! Read are baseline and extended Huffman-coded JPEGs of 8 bits, grey or YCbCr, which is nearly all
//! that there are. Of any other file, and of one in which anything is odd, nothing is said here: it is
//! for the ordinary decoder to read it or to tell what is wrong with it. The format is ITU-T T.81.

use super::Rgb;
use crate::kernels::Isa;

/// Pixels of a block's side.
const SIDE: usize = 8;
/// Coefficients of a block.
const COEFFICIENTS: usize = SIDE * SIDE;
/// Bits that the tables of codes are looked up by. Two tables of 8 KiB for each code, which the first
/// level of cache holds.
const LOOKUP_BITS: u32 = 12;
/// The same for coefficients with their values, most of which are short.
const VALUED_BITS: u32 = 10;
/// Bytes that are read at a time.
const READ: usize = 8;
/// Codes are no longer.
const LONGEST: usize = 16;

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

/// The picture, whole where `by` is 1, or made smaller by 2, 4 or 8, each pixel then the mean of `by` x
/// `by`; a part of one at the right and the bottom edge counts as one. None where its width and height
/// are not `size`, or another decoder has to look at the file.
pub(super) fn read(bytes: &[u8], size: [usize; 2], by: usize) -> Option<Rgb> {
    let mut file = File {
        bytes,
        size,
        by,
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
    components: Vec<Component>,
}

struct Component {
    id: u8,
    /// Sampling factors.
    sampling: [usize; 2],
    quantization: usize,
    /// Blocks of the plane, in whole MCUs.
    blocks: [usize; 2],
    /// Cells that a block becomes; of a whole picture, its pixels.
    cells: [usize; 2],
    /// Of a whole picture: how many pixels of it lie side by side for one of the plane, and how many
    /// of the plane count.
    spread: [usize; 2],
    size: [usize; 2],
    plane: Vec<u8>,
    read: bool,
}

impl Component {
    /// The plane's part of a row of the picture; `sums` is for its own use.
    #[inline(always)]
    fn row(&self, y: usize, row: &mut [u8], sums: &mut Vec<i32>) -> Option<()> {
        let stride = self.blocks[0] * self.cells[0];
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
    dc: &'a Code,
    ac: &'a Code,
    /// For each coefficient, what one of it adds to each cell: `[64, cells]`.
    weights: Vec<f32>,
    /// The first coefficient of the block before.
    before: i32,
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
                0xc0 | 0xc1 => self.start_of_frame(body)?,
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

    fn start_of_frame(&mut self, body: &[u8]) -> Option<()> {
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
        let component = |&[id, factors, quantization]: &[u8; 3]| {
            let sampling = sampling(factors);
            let (mut cells, mut spread, mut size) = ([0; 2], [1; 2], [0; 2]);
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
                size[axis] = ([width, height][axis] * sampling[axis]).div_ceil(largest[axis]);
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
                plane: vec![0; blocks[0] * cells[0] * blocks[1] * cells[1]],
                read: false,
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
        // All coefficients, with all of their bits.
        if chosen.is_empty() || rest != [0, 63, 0] {
            return None;
        }
        let mut scanned = Vec::with_capacity(chosen.len());
        for &[id, tables] in chosen {
            let component = frame.components.iter().position(|c| c.id == id)?;
            let plane = &mut frame.components[component];
            if std::mem::replace(&mut plane.read, true) {
                return None;
            }
            let table = self.quantization.get(plane.quantization)?.as_ref()?;
            let whole = self.by == 1;
            scanned.push(Scanned {
                component,
                steps: whole.then_some(table),
                dc: self.dc.get(usize::from(tables >> 4))?.as_deref()?,
                ac: self.ac.get(usize::from(tables & 15))?.as_deref()?,
                weights: if whole {
                    Vec::new()
                } else {
                    weights(table, plane.cells)
                },
                before: 0,
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

    /// The planes as one picture.
    #[inline(always)]
    fn finish(self) -> Option<Rgb> {
        let frame = self.frame?;
        if !frame.components.iter().all(|component| component.read) {
            return None;
        }
        let (width, height) = (
            frame.width.div_ceil(self.by),
            frame.height.div_ceil(self.by),
        );
        let mut pixels = vec![0; width * height * 3];
        let mut rows = vec![vec![0; width]; frame.components.len()];
        let mut sums = Vec::new();
        for (y, line) in pixels.chunks_exact_mut(width * 3).enumerate() {
            for (component, row) in frame.components.iter().zip(&mut rows) {
                component.row(y, row, &mut sums)?;
            }
            let (line, _) = line.as_chunks_mut::<3>();
            match rows.as_slice() {
                [grey] => {
                    for (pixel, &value) in line.iter_mut().zip(grey) {
                        *pixel = [value; 3];
                    }
                }
                [y, cb, cr] => {
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
                    self.scanned.iter_mut().for_each(|s| s.before = 0);
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

/// Red, green and blue as JFIF defines them, in fixed point of 16 bits.
#[inline(always)]
fn rgb(y: u8, cb: u8, cr: u8) -> [u8; 3] {
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
fn weights(quantization: &[u16; COEFFICIENTS], [columns, rows]: [usize; 2]) -> Vec<f32> {
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

/// A scan's data without the zeros that are stuffed after 255.
struct Entropy {
    /// With zeros behind, since bits are taken some words ahead.
    bytes: Vec<u8>,
    /// Between the restart markers.
    intervals: Vec<std::ops::Range<usize>>,
    /// Where the marker lies that ends the scan.
    end: usize,
}

impl Entropy {
    fn new(file: &[u8], mut at: usize) -> Option<Self> {
        let mut bytes = Vec::with_capacity(file.len() - at + 4 * READ);
        let (mut intervals, mut start) = (Vec::new(), 0);
        loop {
            let rest = file.get(at..)?;
            let found = memchr::memchr(0xff, rest)?;
            bytes.extend_from_slice(&rest[..found]);
            at += found;
            match *file.get(at + 1)? {
                0 => {
                    bytes.push(0xff);
                    at += 2;
                }
                // What fills up before a marker.
                0xff => at += 1,
                0xd0..=0xd7 => {
                    intervals.push(start..bytes.len());
                    start = bytes.len();
                    at += 2;
                }
                _ => break,
            }
        }
        intervals.push(start..bytes.len());
        bytes.extend([0; 4 * READ]);
        Some(Self {
            bytes,
            intervals,
            end: at,
        })
    }
}

/// A Huffman code, as tables by the next bits.
struct Code {
    /// The next symbol: its code's length, then itself; 0 where the code is longer than a look.
    single: Box<[(u8, u8); 1 << LOOKUP_BITS]>,
    /// The next coefficient with its value.
    valued: Box<[Valued; 1 << VALUED_BITS]>,
    /// All coefficients, with their values, that lie within a look.
    several: Box<[Step; 1 << LOOKUP_BITS]>,
    /// Of each length, one more than the largest code, in the upper of 16 bits; and what is added to a
    /// code to find its symbol.
    limits: [(u32, i32); LONGEST + 1],
    symbols: Vec<u8>,
}

/// A coefficient that lies within a look.
#[derive(Clone, Copy, Default)]
struct Valued {
    /// Its length; 0 where it does not, or is none.
    bits: u8,
    /// Zeros before it.
    run: u8,
    value: i16,
}

/// Coefficients stepped over.
#[derive(Clone, Copy, Default)]
struct Step {
    /// Their length; 0 where not even one lies within a look.
    bits: u8,
    /// Positions within the block, and 128 where the rest of it is zeros.
    positions: u8,
}

/// The rest of the block is zeros.
const END: u8 = 128;

impl Code {
    /// From the numbers of codes of each length, and their symbols in order.
    fn new(counts: &[u8; LONGEST], symbols: &[u8]) -> Option<Self> {
        let mut single = vec![(0, 0); 1 << LOOKUP_BITS];
        let mut limits = [(0, 0); LONGEST + 1];
        let (mut code, mut index) = (0_usize, 0_usize);
        for length in 1..=LONGEST {
            let offset = index as i32 - code as i32;
            for _ in 0..counts[length - 1] {
                if let Some(spare) = (LOOKUP_BITS as usize).checked_sub(length) {
                    let from = code << spare;
                    let same = single.get_mut(from..from + (1 << spare))?;
                    same.fill((length as u8, symbols[index]));
                }
                code += 1;
                index += 1;
            }
            if code > 1 << length {
                return None;
            }
            limits[length] = ((code << (LONGEST - length)) as u32, offset);
            code <<= 1;
        }
        let single: Box<[_; 1 << LOOKUP_BITS]> = single.into_boxed_slice().try_into().ok()?;
        let mut several = vec![Step::default(); 1 << LOOKUP_BITS];
        for (next, step) in several.iter_mut().enumerate() {
            loop {
                let rest = (next << step.bits) & ((1 << LOOKUP_BITS) - 1);
                let (length, symbol) = single[rest];
                let (run, size) = (symbol >> 4, symbol & 15);
                let bits = step.bits + length + size;
                if length == 0 || u32::from(bits) > LOOKUP_BITS {
                    break;
                }
                match (run, size) {
                    (0, 0) => {
                        step.bits = bits;
                        step.positions |= END;
                        break;
                    }
                    (1..15, 0) => break,
                    _ => {}
                }
                if step.positions + run + 1 > COEFFICIENTS as u8 {
                    break;
                }
                step.positions += run + 1;
                step.bits = bits;
            }
        }
        let mut valued = vec![Valued::default(); 1 << VALUED_BITS];
        for (next, entry) in valued.iter_mut().enumerate() {
            let (length, symbol) = single[next << (LOOKUP_BITS - VALUED_BITS)];
            let (run, size) = (symbol >> 4, symbol & 15);
            let bits = length + size;
            if length > 0 && size > 0 && u32::from(bits) <= VALUED_BITS {
                let rest = next >> (VALUED_BITS - u32::from(bits));
                let value = signed((rest & ((1 << size) - 1)) as i32, u32::from(size)) as i16;
                *entry = Valued { bits, run, value };
            }
        }
        Some(Self {
            single,
            valued: valued.into_boxed_slice().try_into().ok()?,
            several: several.into_boxed_slice().try_into().ok()?,
            limits,
            symbols: symbols.to_vec(),
        })
    }
}

/// The value of `size` bits, at least one, of which the first tells the sign.
#[inline(always)]
fn signed(bits: i32, size: u32) -> i32 {
    if bits >> (size - 1) == 0 {
        bits + 1 - (1 << size)
    } else {
        bits
    }
}

/// Reads bits, the highest of each byte first.
#[derive(Default)]
struct Bits<'a> {
    bytes: &'a [u8],
    /// Bytes taken, and where they end.
    at: usize,
    end: usize,
    /// The next bits, at the top.
    next: u64,
    /// How many of them there are.
    count: u32,
}

impl<'a> Bits<'a> {
    #[inline(always)]
    fn new(bytes: &'a [u8], interval: &std::ops::Range<usize>) -> Self {
        Self {
            bytes,
            at: interval.start,
            end: interval.end,
            next: 0,
            count: 0,
        }
    }

    /// Bits read.
    #[inline(always)]
    fn position(&self) -> usize {
        self.at * 8 - self.count as usize
    }

    /// At least 56 bits from here on; None far behind the end.
    #[inline(always)]
    fn refill(&mut self) -> Option<()> {
        let bytes = self.bytes.get(self.at..)?.first_chunk::<READ>()?;
        self.next |= u64::from_be_bytes(*bytes) >> self.count;
        let taken = (63 - self.count) / 8;
        self.at += taken as usize;
        self.count += taken * 8;
        Some(())
    }

    #[inline(always)]
    fn skip(&mut self, bits: u32) {
        self.next <<= bits;
        self.count -= bits;
    }

    /// The next symbol of a code; takes at most 16 bits.
    #[inline(always)]
    fn symbol(&mut self, code: &Code) -> Option<u8> {
        let (length, symbol) = code.single[(self.next >> (64 - LOOKUP_BITS)) as usize];
        if length > 0 {
            self.skip(u32::from(length));
            return Some(symbol);
        }
        let next = (self.next >> 48) as u32;
        let longer = LOOKUP_BITS as usize + 1..=LONGEST;
        let length = longer.into_iter().find(|&l| next < code.limits[l].0)?;
        let index = (next >> (LONGEST - length)) as i32 + code.limits[length].1;
        self.skip(length as u32);
        code.symbols.get(usize::try_from(index).ok()?).copied()
    }

    /// A value of so many bits, at most 15.
    #[inline(always)]
    fn value(&mut self, size: u32) -> i32 {
        if size == 0 {
            return 0;
        }
        let value = (self.next >> (64 - size)) as i32;
        self.skip(size);
        signed(value, size)
    }

    #[inline(always)]
    fn block(
        &mut self,
        scanned: &mut Scanned,
        component: &mut Component,
        [column, row]: [usize; 2],
    ) -> Option<()> {
        let [across, down] = component.cells;
        let stride = component.blocks[0] * across;
        let place = component
            .plane
            .get_mut(row * down * stride + column * across..)?;
        if let Some(steps) = scanned.steps {
            return self.pixels(scanned, steps, place, stride);
        }
        match [across, down] {
            [1, 1] => self.cells::<1, 1>(scanned, place, stride),
            [1, 2] => self.cells::<1, 2>(scanned, place, stride),
            [2, 1] => self.cells::<2, 1>(scanned, place, stride),
            [2, 2] => self.cells::<2, 2>(scanned, place, stride),
            [2, 4] => self.cells::<2, 4>(scanned, place, stride),
            [4, 2] => self.cells::<4, 2>(scanned, place, stride),
            [4, 4] => self.cells::<4, 4>(scanned, place, stride),
            [4, 8] => self.cells::<4, 8>(scanned, place, stride),
            [8, 4] => self.cells::<8, 4>(scanned, place, stride),
            [8, 8] => self.cells::<8, 8>(scanned, place, stride),
            _ => None,
        }
    }

    /// The first coefficient of a block, by its difference from the one before.
    #[inline(always)]
    fn first(&mut self, scanned: &mut Scanned) -> Option<i32> {
        self.refill()?;
        let size = self.symbol(scanned.dc)?;
        if size > 11 {
            return None;
        }
        scanned.before = scanned.before.checked_add(self.value(u32::from(size)))?;
        Some(scanned.before)
    }

    /// Hands on the coefficients after the first, up to `last`, and gives the position that comes next.
    #[inline(always)]
    fn coefficients(
        &mut self,
        code: &Code,
        last: usize,
        mut each: impl FnMut(usize, i32),
    ) -> Option<usize> {
        let mut at = 1;
        while at <= last {
            self.refill()?;
            let next = code.valued[(self.next >> (64 - VALUED_BITS)) as usize];
            let value = if next.bits > 0 {
                self.skip(u32::from(next.bits));
                at += usize::from(next.run);
                i32::from(next.value)
            } else {
                let symbol = self.symbol(code)?;
                let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
                match (run, size) {
                    (0, 0) => return Some(COEFFICIENTS),
                    (15, 0) => {
                        at += 16;
                        continue;
                    }
                    (_, 0) => return None,
                    _ => at += run,
                }
                self.value(size)
            };
            if at >= COEFFICIENTS {
                return None;
            }
            each(at, value);
            at += 1;
        }
        Some(at)
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
        let at = self.coefficients(scanned.ac, COEFFICIENTS - 1, |at, value| {
            let (row, column) = ZIGZAG[at];
            block[usize::from(row)][usize::from(column)] = value.wrapping_mul(i32::from(steps[at]));
            plain = false;
        })?;
        if at > COEFFICIENTS {
            return None;
        }
        let pixels = if plain {
            let value = (block[0][0].wrapping_add(4) >> 3).saturating_add(128);
            [[value.clamp(0, 255) as u8; SIDE]; SIDE]
        } else {
            inverse(block)
        };
        for (row, pixels) in pixels.iter().enumerate() {
            *place.get_mut(row * stride..)?.first_chunk_mut()? = *pixels;
        }
        Some(())
    }

    /// Reads a block as the means of its cells.
    #[inline(always)]
    fn cells<const ACROSS: usize, const DOWN: usize>(
        &mut self,
        scanned: &mut Scanned,
        place: &mut [u8],
        stride: usize,
    ) -> Option<()> {
        let first = self.first(scanned)? as f32;
        let (weights, _) = scanned.weights.as_chunks::<ACROSS>();
        let (weights, _) = weights.as_chunks::<DOWN>();
        let weights: &[[[f32; ACROSS]; DOWN]; COEFFICIENTS] = weights.first_chunk()?;
        // The last coefficient that tells much. The even ones but the first have a mean of 0 over four
        // pixels, so that after the fifth (the first of both directions) comes little.
        let last = match ACROSS.max(DOWN) {
            1 => 0,
            2 => 4,
            _ => COEFFICIENTS - 1,
        };
        // Loops rather than maps over arrays, which are not always made part of the function that
        // is compiled for the machine.
        let mut sums = [[128.0; ACROSS]; DOWN];
        for row in 0..DOWN {
            for column in 0..ACROSS {
                sums[row][column] += weights[0][row][column] * first;
            }
        }
        let code = scanned.ac;
        let mut at = self.coefficients(code, last, |at, value| {
            for row in 0..DOWN {
                for column in 0..ACROSS {
                    sums[row][column] += weights[at][row][column] * value as f32;
                }
            }
        })?;
        while at < COEFFICIENTS {
            self.refill()?;
            let step = code.several[(self.next >> (64 - LOOKUP_BITS)) as usize];
            let to = at + usize::from(step.positions & !END);
            let ends = step.positions & END != 0;
            // The end of a block is only told where something is left of it.
            if step.bits > 0 && to + usize::from(ends) <= COEFFICIENTS {
                self.skip(u32::from(step.bits));
                at = if ends { COEFFICIENTS } else { to };
                continue;
            }
            let symbol = self.symbol(code)?;
            let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
            match (run, size) {
                (0, 0) => break,
                (1..15, 0) => return None,
                _ => at += run + 1,
            }
            self.skip(size);
        }
        if at > COEFFICIENTS {
            return None;
        }
        for (row, sums) in sums.iter().enumerate() {
            let line = place.get_mut(row * stride..)?.first_chunk_mut::<ACROSS>()?;
            for (place, sum) in line.iter_mut().zip(sums) {
                // Rounded, and cut to what a byte holds.
                *place = (sum + 0.5) as u8;
            }
        }
        Some(())
    }
}

/// Bits of the constants of the transform, and of what the first pass keeps of its fractions.
const CONSTANT: i32 = 13;
const KEPT: i32 = 2;

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
