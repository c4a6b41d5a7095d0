//! Products of float32 values on matrix units (Intel's AMX). Those multiply bfloat16 values alone, but
//! sixteen times as many a cycle as vectors do of float32.
//!
//! A float32 has 24 significant bits, a bfloat16 has 8 and the same exponents. So each value is the sum of
//! three bfloat16, without any error: its first 8 bits, the next and the last (Henry, Tang & Heinecke 2019,
//! <https://arxiv.org/abs/1904.06376>). Of the nine products of two such sums six are computed; the others
//! are below the last bit of a float32 product. A product of two bfloat16 is exact, and sums are float32. A
//! unit sums 32 products in two chains before it adds them to what there is, so that all in all less is
//! rounded away than in a chain of float32 multiply-adds. What is smaller than 1e-33 can lose digits, and
//! an infinite value makes its sums NaN.
//!
//! # Tiles
//! A unit has eight tiles, of up to 16 rows of 64 bytes. A step multiplies 16 rows by 32 of the depth with
//! 32 of the depth by 16 columns. Word `j` of a left tile's row is the pair of values at the depths `j` and
//! `16 + j` of the step, and row `j` of a right tile is that pair of each column: in this order a word is
//! made of two vectors by a shift and a mask, and nothing moves within vectors. A tile's three parts
//! ([`split`]) follow each other, and so do the steps of a tile.

mod emulated;

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::memory::{Buffer, LARGE_PAGE_VALUES};

/// Rows of a tile, words of its rows, and columns of a product of two.
pub const SIDE: usize = 16;
/// Words of one part of a tile.
const PART: usize = SIDE * SIDE;
/// Words of a tile in its three parts.
pub const TILE: usize = 3 * PART;
/// Columns of a block of sums, two tiles by two.
pub const SUMS_WIDTH: usize = 2 * SIDE;
/// Values of such a block.
pub const SUMS: usize = SUMS_WIDTH * SUMS_WIDTH;

/// In tests, products are computed in software where there are no units.
pub const EMULATED: bool = cfg!(any(test, feature = "emulated"));

/// Whether the processor has units, and the system lets this process use them.
pub fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16_AND_TILES: u32 = 1 << 22 | 1 << 24;
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & BF16_AND_TILES != BF16_AND_TILES {
            return false;
        }
        permitted() && is_x86_feature_detected!("avx512f")
    })
}

/// Asks the system for the state of the tiles, which it does not save without.
#[cfg(target_os = "linux")]
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: a request without memory; all threads of the process have what is granted.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

thread_local! {
    /// Each thread's split sides and sums, kept from product to product.
    static MEMORY: RefCell<Buffer> = RefCell::default();
}

/// Calls `f` with this thread's memory for so many values, at the beginning of a line of the cache.
///
/// # Panics
/// Where `f` asks for it too.
pub fn with_memory<R>(values: usize, f: impl FnOnce(*mut f32) -> R) -> R {
    MEMORY.with_borrow_mut(|memory| {
        // In small pages, which lie anywhere, what belongs together would share few sets of the second-level
        // cache.
        memory.reserve(values.max(LARGE_PAGE_VALUES));
        f(memory.pointer())
    })
}

/// This thread's unit, with left tiles and sums of some rows; it is free again when this is dropped.
pub struct Unit {
    rows: usize,
    thread: PhantomData<*const ()>,
}

/// One tile or two of a side: where their steps begin.
#[derive(Clone, Copy)]
pub struct Tiles {
    pub count: usize,
    pub first: *const u32,
    /// Words from there to the second's.
    pub apart: usize,
}

/// What is read after a product: asked for meanwhile, so many lines of the cache in each step.
#[derive(Clone, Copy)]
pub struct Soon {
    pub at: *const f32,
    pub lines: usize,
}

impl Soon {
    pub const NOTHING: Self = Self {
        at: std::ptr::null(),
        lines: 0,
    };
}

/// The palette, then bytes of a row and rows of each tile.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Unit {
    /// # Panics
    /// Where there is none, or a tile has not so many rows.
    pub fn new(rows: usize) -> Self {
        assert!((EMULATED || is_available()) && (1..=SIDE).contains(&rows));
        let unit = Self {
            rows,
            thread: PhantomData,
        };
        if unit.is_emulated() {
            return unit;
        }
        let mut configuration = Configuration {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        configuration.row_bytes[..8].fill(64);
        // Sums and left tiles; right tiles have all rows.
        configuration.rows[..6].fill(rows as u8);
        configuration.rows[6..8].fill(SIDE as u8);
        // SAFETY: there is a unit, and the configuration is one of its.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly))
        };
        unit
    }

    fn is_emulated(&self) -> bool {
        EMULATED && !is_available()
    }

    /// The product of some left tiles with some right ones, stored as a block of sums or added to one.
    ///
    /// # Safety
    /// The tiles have so many steps, and behind `sums` lies a block, for the caller alone.
    pub unsafe fn multiply(
        &self,
        left: Tiles,
        right: Tiles,
        steps: usize,
        sums: *mut f32,
        add: bool,
        soon: Soon,
    ) {
        debug_assert!(steps > 0);
        // SAFETY: as the caller promises; without AVX-512 nothing is split into tiles.
        unsafe {
            if self.is_emulated() {
                return emulated::multiply(self.rows, left, right, steps, sums, add);
            }
            match [left.count, right.count] {
                [2, 2] => two_by_two(left, right, steps, sums, add, soon),
                [2, 1] => two_by_one(left, right, steps, sums, add, soon),
                [1, 2] => one_by_two(left, right, steps, sums, add, soon),
                _ => one_by_one(left, right, steps, sums, add, soon),
            }
        }
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        if !self.is_emulated() {
            // SAFETY: there is a unit.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}

/// Loads a part of a tile: 0 has the first bits.
macro_rules! load {
    ($tile:literal, $from:literal, $part:literal) => {
        concat!(
            "tileloadd tmm",
            $tile,
            ", [{",
            $from,
            "} + 1*{row} + ",
            $part,
            " * 1024]"
        )
    };
}

macro_rules! multiply {
    ($sum:literal, $left:literal, $right:literal) => {
        concat!("tdpbf16ps tmm", $sum, ", tmm", $left, ", tmm", $right)
    };
}

/// A kernel: sums at their places in a block, and what a step does. Small products come first, and in the
/// same order in every kernel, so that no bit of a sum depends on its tile's place.
macro_rules! kernel {
    ($name:ident, sums: $($sum:literal at $at:literal),*; step: $($step:expr),* $(,)?) => {
        unsafe fn $name(
            left: Tiles,
            right: Tiles,
            steps: usize,
            sums: *mut f32,
            add: bool,
            soon: Soon,
        ) {
            // SAFETY: as `Unit::multiply`.
            unsafe {
                asm!(
                    "test {add}, {add}",
                    "jz 2f",
                    $(concat!("tileloadd tmm", $sum, ", [{sums} + 1*{sums_row} + ", $at, "]"),)*
                    "jmp 3f",
                    "2:",
                    $(concat!("tilezero tmm", $sum),)*
                    "3:",
                    "mov {left}, {lines}",
                    "jmp 5f",
                    "4:",
                    "prefetcht1 [{soon}]",
                    "add {soon}, 64",
                    "5:",
                    "sub {left}, 1",
                    "jnc 4b",
                    $($step,)*
                    "add {a0}, 3072",
                    "add {a1}, 3072",
                    "add {b0}, 3072",
                    "add {b1}, 3072",
                    "dec {steps}",
                    "jnz 3b",
                    $(concat!("tilestored [{sums} + 1*{sums_row} + ", $at, "], tmm", $sum),)*
                    a0 = inout(reg) left.first => _,
                    a1 = inout(reg) left.first.wrapping_add(left.apart) => _,
                    b0 = inout(reg) right.first => _,
                    b1 = inout(reg) right.first.wrapping_add(right.apart) => _,
                    soon = inout(reg) soon.at => _,
                    lines = in(reg) soon.lines,
                    steps = inout(reg) steps => _,
                    row = in(reg) 64_usize,
                    sums = in(reg) sums,
                    sums_row = in(reg) 4 * SUMS_WIDTH,
                    add = in(reg) usize::from(add),
                    left = out(reg) _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

kernel!(two_by_two, sums: 0 at 0, 1 at 64, 2 at 2048, 3 at 2112; step:
    load!(4, "a0", 2), load!(5, "a1", 2), load!(6, "b0", 0), load!(7, "b1", 0),
    multiply!(0, 4, 6), multiply!(1, 4, 7), multiply!(2, 5, 6), multiply!(3, 5, 7),
    load!(4, "a0", 1), load!(5, "a1", 1),
    multiply!(0, 4, 6), multiply!(1, 4, 7), multiply!(2, 5, 6), multiply!(3, 5, 7),
    load!(6, "b0", 1), load!(7, "b1", 1),
    multiply!(0, 4, 6), multiply!(1, 4, 7), multiply!(2, 5, 6), multiply!(3, 5, 7),
    load!(4, "a0", 0), load!(5, "a1", 0),
    multiply!(0, 4, 6), multiply!(1, 4, 7), multiply!(2, 5, 6), multiply!(3, 5, 7),
    load!(6, "b0", 2), load!(7, "b1", 2),
    multiply!(0, 4, 6), multiply!(1, 4, 7), multiply!(2, 5, 6), multiply!(3, 5, 7),
    load!(6, "b0", 0), load!(7, "b1", 0),
    multiply!(0, 4, 6), multiply!(1, 4, 7), multiply!(2, 5, 6), multiply!(3, 5, 7),
);

kernel!(two_by_one, sums: 0 at 0, 2 at 2048; step:
    load!(4, "a0", 2), load!(5, "a1", 2), load!(6, "b0", 0),
    multiply!(0, 4, 6), multiply!(2, 5, 6),
    load!(4, "a0", 1), load!(5, "a1", 1), load!(7, "b0", 1),
    multiply!(0, 4, 6), multiply!(2, 5, 6), multiply!(0, 4, 7), multiply!(2, 5, 7),
    load!(4, "a0", 0), load!(5, "a1", 0),
    multiply!(0, 4, 7), multiply!(2, 5, 7),
    load!(7, "b0", 2),
    multiply!(0, 4, 7), multiply!(2, 5, 7), multiply!(0, 4, 6), multiply!(2, 5, 6),
);

kernel!(one_by_two, sums: 0 at 0, 1 at 64; step:
    load!(4, "a0", 2), load!(6, "b0", 0), load!(7, "b1", 0),
    multiply!(0, 4, 6), multiply!(1, 4, 7),
    load!(5, "a0", 1),
    multiply!(0, 5, 6), multiply!(1, 5, 7),
    load!(6, "b0", 1), load!(7, "b1", 1),
    multiply!(0, 5, 6), multiply!(1, 5, 7),
    load!(4, "a0", 0),
    multiply!(0, 4, 6), multiply!(1, 4, 7),
    load!(6, "b0", 2), load!(7, "b1", 2),
    multiply!(0, 4, 6), multiply!(1, 4, 7),
    load!(6, "b0", 0), load!(7, "b1", 0),
    multiply!(0, 4, 6), multiply!(1, 4, 7),
);

kernel!(one_by_one, sums: 0 at 0; step:
    load!(4, "a0", 2), load!(5, "a0", 1), load!(6, "b0", 0), load!(7, "b0", 1),
    multiply!(0, 4, 6), multiply!(0, 5, 6), multiply!(0, 5, 7),
    load!(4, "a0", 0),
    multiply!(0, 4, 7),
    load!(7, "b0", 2),
    multiply!(0, 4, 7), multiply!(0, 4, 6),
);

/// Splits two vectors of float32 and writes the pairs that a row of a tile is made of, a part each.
///
/// # Safety
/// Behind `to` lies a tile from that row on, for the caller alone.
#[inline]
#[target_feature(enable = "avx512f")]
pub unsafe fn split(mut first: __m512, mut second: __m512, to: *mut u32) {
    let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for part in 0..3 {
        let bits = [first, second].map(|v| _mm512_castps_si512(v));
        // (first >> 16) | (second & high)
        let pairs =
            _mm512_ternarylogic_epi32::<0xf8>(_mm512_srli_epi32::<16>(bits[0]), bits[1], high);
        // SAFETY: as the caller promises.
        unsafe { _mm512_storeu_si512(to.add(part * PART).cast(), pairs) };
        if part < 2 {
            first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_and_si512(bits[0], high)));
            second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(bits[1], high)));
        }
    }
}

/// A matrix of sixteen rows and columns transposed.
#[inline]
#[target_feature(enable = "avx512f")]
pub fn turned(rows: [__m512; SIDE]) -> [__m512; SIDE] {
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
    }
    // Columns of four rows: each lane of 128 bits holds those of four columns, one of them here.
    let mut fours = pairs;
    for i in 0..4 {
        for half in 0..2 {
            let [a, b] = [pairs[4 * i + half], pairs[4 * i + 2 + half]];
            let [a, b] = [_mm512_castps_pd(a), _mm512_castps_pd(b)];
            fours[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            fours[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    // fours[4 i + c], lane l: column 4 l + c of the rows 4 i to 4 i + 3.
    let mut columns = rows;
    for c in 0..4 {
        let [a, b, d, e] = [fours[c], fours[4 + c], fours[8 + c], fours[12 + c]];
        let low = [
            _mm512_shuffle_f32x4::<0x88>(a, b),
            _mm512_shuffle_f32x4::<0x88>(d, e),
        ];
        let high = [
            _mm512_shuffle_f32x4::<0xdd>(a, b),
            _mm512_shuffle_f32x4::<0xdd>(d, e),
        ];
        columns[c] = _mm512_shuffle_f32x4::<0x88>(low[0], low[1]);
        columns[8 + c] = _mm512_shuffle_f32x4::<0xdd>(low[0], low[1]);
        columns[4 + c] = _mm512_shuffle_f32x4::<0x88>(high[0], high[1]);
        columns[12 + c] = _mm512_shuffle_f32x4::<0xdd>(high[0], high[1]);
    }
    columns
}

/// Memory that ends where none may be touched: what reads or writes behind it is killed. Checkers of memory do
/// not know these instructions.
#[cfg(all(test, unix))]
pub mod guarded {
    /// Values before a page that nobody may touch.
    pub struct Guarded {
        block: *mut libc::c_void,
        len: usize,
        values: *mut [f32],
    }

    const PAGE: usize = 64 << 10;

    impl Guarded {
        pub fn new(values: &[f32]) -> Self {
            let bytes = size_of_val(values);
            let len = bytes.next_multiple_of(PAGE) + PAGE;
            // SAFETY: a block of its own, of which the last page is taken away; values lie before it.
            unsafe {
                let access = libc::PROT_READ | libc::PROT_WRITE;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
                let block = libc::mmap(std::ptr::null_mut(), len, access, flags, -1, 0);
                assert_ne!(block, libc::MAP_FAILED);
                let guard = block.add(len - PAGE);
                assert_eq!(libc::mprotect(guard, PAGE, libc::PROT_NONE), 0);
                let start = guard.sub(bytes).cast::<f32>();
                start.copy_from_nonoverlapping(values.as_ptr(), values.len());
                let values = std::ptr::slice_from_raw_parts_mut(start, values.len());
                Self { block, len, values }
            }
        }

        pub fn pointer(&self) -> *mut f32 {
            self.values.cast()
        }

        pub fn values(&mut self) -> &mut [f32] {
            // SAFETY: values of the block, which is this one's own.
            unsafe { &mut *self.values }
        }
    }

    impl Drop for Guarded {
        fn drop(&mut self) {
            // SAFETY: mapped with this length.
            unsafe { libc::munmap(self.block, self.len) };
        }
    }
}
