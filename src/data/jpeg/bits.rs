//! A scan's data: bits, Huffman codes, and the coefficients that they stand for.

use super::COEFFICIENTS;

/// Bits that the tables of codes are looked up by. Two tables of 8 KiB for each code, which the first
/// level of cache holds.
const LOOKUP_BITS: u32 = 12;
/// The same for coefficients with their values, most of which are short.
const VALUED_BITS: u32 = 10;
/// Bytes that are read at a time.
const READ: usize = 8;
/// Bits that are there after a read, at least. The next read waits for all before it, so that there are
/// as many looks as they allow between two of them.
const READY: u32 = 56;
/// Codes are no longer.
pub const LONGEST: usize = 16;

/// A scan's data without the zeros that are stuffed after 255.
pub struct Entropy {
    /// With zeros behind, since bits are taken some words ahead.
    pub bytes: Vec<u8>,
    /// Between the restart markers.
    pub intervals: Vec<std::ops::Range<usize>>,
    /// Where the marker lies that ends the scan.
    pub end: usize,
}

impl Entropy {
    /// Where the marker lies that ends a scan's data.
    pub fn end_of(file: &[u8], mut at: usize) -> Option<usize> {
        loop {
            at += memchr::memchr(0xff, file.get(at..)?)?;
            match *file.get(at + 1)? {
                0 | 0xd0..=0xd7 => at += 2,
                0xff => at += 1,
                _ => return Some(at),
            }
        }
    }

    pub fn new(file: &[u8], mut at: usize) -> Option<Self> {
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
pub struct Code {
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
    /// Zeros before it; [`END`] where the rest of the block is zeros.
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
    pub fn new(counts: &[u8; LONGEST], symbols: &[u8]) -> Option<Self> {
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
            if length == 0 || u32::from(bits) > VALUED_BITS {
                continue;
            }
            if symbol == 0 {
                let (run, value) = (END, 0);
                *entry = Valued { bits, run, value };
            } else if size > 0 {
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
    // Without a branch, which would be guessed wrong every other time.
    let negative = (bits >> (size - 1)) - 1;
    bits + (negative & (1 - (1 << size)))
}

/// Reads bits, the highest of each byte first.
#[derive(Default)]
pub struct Bits<'a> {
    bytes: &'a [u8],
    /// Bytes taken, and where they end.
    at: usize,
    pub end: usize,
    /// The next bits, at the top.
    next: u64,
    /// How many of them there are.
    count: u32,
}

impl<'a> Bits<'a> {
    #[inline(always)]
    pub fn new(bytes: &'a [u8], interval: &std::ops::Range<usize>) -> Self {
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
    pub fn position(&self) -> usize {
        self.at * 8 - self.count as usize
    }

    /// At least 56 bits from here on; None far behind the end.
    #[inline(always)]
    pub fn refill(&mut self) -> Option<()> {
        let bytes = self.bytes.get(self.at..)?.first_chunk::<READ>()?;
        self.next |= u64::from_be_bytes(*bytes) >> self.count;
        let taken = (63 - self.count) / 8;
        self.at += taken as usize;
        self.count += taken * 8;
        Some(())
    }

    #[inline(always)]
    pub fn skip(&mut self, bits: u32) {
        self.next <<= bits;
        self.count -= bits;
    }

    /// The next symbol of a code; takes at most 16 bits.
    #[inline(always)]
    pub fn symbol(&mut self, code: &Code) -> Option<u8> {
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
    pub fn value(&mut self, size: u32) -> i32 {
        if size == 0 {
            return 0;
        }
        let value = (self.next >> (64 - size)) as i32;
        self.skip(size);
        signed(value, size)
    }

    /// The next bits, from the top down.
    #[inline(always)]
    pub fn next_bits(&self) -> u64 {
        self.next
    }

    /// One bit.
    #[inline(always)]
    pub fn bit(&mut self) -> Option<bool> {
        if self.count == 0 {
            self.refill()?;
        }
        let bit = self.next >> 63 == 1;
        self.skip(1);
        Some(bit)
    }

    /// The value that follows on a symbol which is its size; takes at most 27 bits.
    #[inline(always)]
    pub fn difference(&mut self, code: &Code) -> Option<i32> {
        let next = code.valued[(self.next >> (64 - VALUED_BITS)) as usize];
        if next.bits > 0 {
            self.skip(u32::from(next.bits));
            return (next.run & !END == 0).then_some(i32::from(next.value));
        }
        let size = self.symbol(code)?;
        (size <= 11).then(|| self.value(u32::from(size)))
    }

    /// Hands on the coefficients from `at` to `last`, and gives the position that comes next.
    #[inline(always)]
    pub fn coefficients(
        &mut self,
        code: &Code,
        mut at: usize,
        last: usize,
        mut each: impl FnMut(usize, i32),
    ) -> Option<usize> {
        while at <= last {
            self.refill()?;
            for _ in 0..READY / VALUED_BITS {
                let next = code.valued[(self.next >> (64 - VALUED_BITS)) as usize];
                let value = if next.bits > 0 {
                    self.skip(u32::from(next.bits));
                    at += usize::from(next.run);
                    i32::from(next.value)
                } else {
                    self.refill()?;
                    let symbol = self.symbol(code)?;
                    let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
                    match (run, size) {
                        (0, 0) => return Some(COEFFICIENTS),
                        (15, 0) => {
                            at += 16;
                            break;
                        }
                        (_, 0) => return None,
                        _ => at += run,
                    }
                    self.value(size)
                };
                if at >= COEFFICIENTS {
                    return (at >= usize::from(END)).then_some(COEFFICIENTS);
                }
                each(at, value);
                at += 1;
                if next.bits == 0 || at > last {
                    break;
                }
            }
        }
        Some(at)
    }

    /// Steps over the rest of a block, from a position on.
    #[inline(always)]
    pub fn step_over(&mut self, code: &Code, mut at: usize) -> Option<()> {
        while at < COEFFICIENTS {
            self.refill()?;
            for _ in 0..READY / LOOKUP_BITS {
                let step = code.several[(self.next >> (64 - LOOKUP_BITS)) as usize];
                let to = at + usize::from(step.positions & !END);
                let ends = step.positions & END != 0;
                // The end of a block is only told where something is left of it.
                if step.bits > 0 && to + usize::from(ends) <= COEFFICIENTS {
                    self.skip(u32::from(step.bits));
                    if ends || to == COEFFICIENTS {
                        return Some(());
                    }
                    at = to;
                    continue;
                }
                self.refill()?;
                let symbol = self.symbol(code)?;
                let (run, size) = (usize::from(symbol >> 4), u32::from(symbol & 15));
                match (run, size) {
                    (0, 0) => return Some(()),
                    (1..15, 0) => return None,
                    _ => at += run + 1,
                }
                self.skip(size);
                break;
            }
        }
        (at <= COEFFICIENTS).then_some(())
    }
}
