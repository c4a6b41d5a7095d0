use pulp::{Arch, Simd, WithSimd};

/// The environment variable that forces an instruction set.
const VARIABLE: &str = "SCONCE_ISA";
/// What it can say. Matrix units are taken where there are some, and asked for where they would be software.
const NAMES: &[&str] = if cfg!(feature = "emulated") {
    &["vectors", "avx2", "portable", "amx"]
} else {
    &["vectors", "avx2", "portable"]
};

/// The instruction set that kernels use.
#[derive(Clone, Copy, Debug)]
pub struct Isa {
    arch: Arch,
    /// Products are computed on matrix units.
    matrix_unit: bool,
}

impl Isa {
    /// The best that this machine has (AVX-512, AVX2 with FMA, NEON; products on AMX, where there is
    /// that). The environment variable `SCONCE_ISA` forces another: `vectors` leaves out matrix units,
    /// `avx2` AVX-512 too, and `portable` is plain scalar code, which runs anywhere. With the feature
    /// `emulated`, `amx` are matrix units, in software where there are none.
    pub fn detect() -> Self {
        let name = std::env::var_os(VARIABLE).unwrap_or_default();
        if name == "portable" {
            return Self::portable();
        }
        let isa = Self::of(Arch::new());
        if name == "avx2" {
            return isa.narrower();
        }
        #[cfg(target_arch = "x86_64")]
        if name != "vectors" && super::amx::is_available() {
            return isa.with_matrix_unit();
        }
        #[cfg(feature = "emulated")]
        if name == "amx" {
            return isa.with_matrix_unit();
        }
        isa
    }

    /// The same with products on matrix units, where there is AVX-512. Without such units they are computed in
    /// software, which is slow, and only in tests.
    #[cfg(any(test, feature = "emulated", target_arch = "x86_64"))]
    pub(super) fn with_matrix_unit(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        if super::amx::EMULATED || super::amx::is_available() {
            return Self {
                matrix_unit: self.avx512().is_some(),
                ..self
            };
        }
        self
    }

    /// Checks the environment variable `SCONCE_ISA`.
    ///
    /// # Errors
    /// Where it has a value that [`Isa::detect`] does not know, and takes for none.
    pub fn check_environment() -> Result<(), String> {
        match std::env::var_os(VARIABLE) {
            Some(name) if !name.is_empty() && NAMES.iter().all(|known| name != **known) => {
                Err(format!(
                    "{VARIABLE}={}: no instruction set of that name; there are {}",
                    name.display(),
                    NAMES.join(", ")
                ))
            }
            _ => Ok(()),
        }
    }

    /// No vectors at all.
    pub fn portable() -> Self {
        Self::of(Arch::Scalar)
    }

    fn of(arch: Arch) -> Self {
        Self {
            arch,
            matrix_unit: false,
        }
    }

    /// Whether products are computed on matrix units.
    pub fn has_matrix_unit(self) -> bool {
        self.matrix_unit
    }

    /// The same without matrix units.
    pub fn vectors_only(self) -> Self {
        Self::of(self.arch)
    }

    /// Runs a kernel that is written over vectors.
    #[inline(always)]
    pub(super) fn dispatch<Op: WithSimd>(self, op: Op) -> Op::Output {
        self.arch.dispatch(op)
    }

    /// Runs plain loops, compiled for the instruction set: those of a closure that is `#[inline(always)]`,
    /// as is all that it calls. What is not inlined has no vectors but those of every processor.
    #[inline(always)]
    pub fn compiled<R>(self, op: impl FnOnce() -> R) -> R {
        self.arch.dispatch(op)
    }

    /// Whether kernels may use AVX2 and FMA by name.
    pub fn has_avx2(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.avx2().is_some();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn avx2(self) -> Option<pulp::x86::V3> {
        match self.arch {
            Arch::Scalar => None,
            _ => pulp::x86::V3::try_new(),
        }
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn avx512(self) -> Option<pulp::x86::V4> {
        match self.arch {
            Arch::V4(simd) => Some(simd),
            _ => None,
        }
    }

    /// The same with vectors of half the size, where there are such: sixteen values to eight.
    pub fn narrower(self) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let (16, Some(simd)) = (self.lanes(), self.avx2()) {
            return Self::of(Arch::V3(simd));
        }
        self
    }

    /// For the product of an image's `rows`, each `taps` runs of `run` values, with so many columns: without
    /// a matrix unit where feeding it takes longer than it saves, and with narrower vectors where the widest
    /// would be padded by more than a tenth of the columns (24 are a vector and a half of sixteen).
    ///
    /// A unit wants sixteen rows and runs of whole vectors, and what is split for it has to be used often.
    pub fn for_product(self, rows: usize, [taps, run]: [usize; 2], columns: usize) -> Self {
        let padded = run.next_multiple_of(16);
        if self.matrix_unit
            && rows >= 12
            && columns >= 64
            && taps * run >= 96
            && padded - run <= padded / 5
        {
            return self;
        }
        let vectors = self.vectors_only();
        let narrower = vectors.narrower();
        let padded = |isa: Self| columns.next_multiple_of(isa.lanes());
        if padded(vectors) > padded(narrower) + columns / 10 {
            narrower
        } else {
            vectors
        }
    }

    /// Values in a vector.
    pub fn lanes(self) -> usize {
        struct Lanes;
        impl WithSimd for Lanes {
            type Output = usize;
            #[inline(always)]
            fn with_simd<S: Simd>(self, _: S) -> usize {
                S::F32_LANES
            }
        }
        self.dispatch(Lanes)
    }
}

/// Reads a vector.
///
/// # Safety
/// As many values as a vector has lie behind the pointer.
#[inline(always)]
pub(super) unsafe fn load<S: Simd>(from: *const f32) -> S::f32s {
    // SAFETY: as the caller promises; no alignment is assumed.
    unsafe { from.cast::<S::f32s>().read_unaligned() }
}

/// Writes a vector.
///
/// # Safety
/// As many values as a vector has lie behind the pointer, for the caller alone.
#[inline(always)]
pub(super) unsafe fn store<S: Simd>(to: *mut f32, value: S::f32s) {
    // SAFETY: as the caller promises; no alignment is assumed.
    unsafe { to.cast::<S::f32s>().write_unaligned(value) }
}

/// Asks for the cache lines of `count` values, which are written soon: the processor fetches them while
/// it computes. Only a hint, for addresses that need not exist.
#[inline(always)]
pub(crate) fn prefetch(at: *const f32, count: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..count).step_by(16) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: it is part of every x86-64, and does not read.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (at, count);
}

/// Asks for one cache line, to lie in the second-level cache. Only a hint, as [`prefetch`].
#[inline(always)]
pub(crate) fn prefetch_far(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: it is part of every x86-64, and does not read.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
