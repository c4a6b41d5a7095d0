//! Products whose weights are packed anew for each step.

use std::cell::RefCell;
use std::ops::Range;

use super::super::values::{Memory, ValueId};
use crate::kernels::Isa;
use crate::kernels::gemm::{Epilogue, Packed, Rows, gemm};

/// A product whose depth is divided: a chain of a thousand additions loses more digits than the
/// sum of four chains of a quarter, and what PyTorch's libraries do is as good. A matrix unit's is whole: its
/// sums are not such chains.
pub struct Product {
    /// Values behind each tap.
    run: usize,
    /// Parts of the depth that are multiplied together, panel by panel, so that what they are added to
    /// stays in the first cache: few enough that the second holds the rows of a block.
    together: Vec<Vec<Part>>,
}

/// A part of a product's depth.
struct Part {
    /// Where it begins.
    start: usize,
    packed: Packed,
}

/// The right sides of some products, one after the other: `[depth, columns]`, or `[columns, depth]`.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    pub values: &'a [f32],
    pub transposed: bool,
}

/// Some columns of a product, and where each of its rows begins there.
pub struct PanelRows {
    pub columns: Range<usize>,
    pub rows: Vec<*mut f32>,
}

thread_local! {
    /// Panels that are filled as a whole.
    static WHOLE: RefCell<Vec<Vec<f32>>> = RefCell::default();
}

impl Product {
    const DEPTH: usize = 256;
    /// Parts that are multiplied together.
    const TOGETHER: usize = 4;

    pub fn new(isa: Isa, rows: usize, [runs, run]: [usize; 2], columns: usize) -> Self {
        let isa = isa.for_product(rows, [runs, run], columns);
        if isa.has_matrix_unit() {
            let packed = Packed::borrowing_runs(isa, [runs, run], columns);
            let together = vec![vec![Part { start: 0, packed }]];
            return Self { run, together };
        }
        let mut bounds = vec![0];
        if run > Self::DEPTH {
            let pieces = run.div_ceil(Self::DEPTH);
            let ends = |of: usize| (1..=pieces).map(move |piece| of * run + piece * run / pieces);
            bounds.extend((0..runs).flat_map(ends));
        } else {
            let step = (Self::DEPTH / run).max(1);
            bounds.extend(
                (step..runs)
                    .step_by(step)
                    .chain([runs])
                    .map(|end| end * run),
            );
        }
        let parts: Vec<&[usize]> = bounds.windows(2).collect();
        let together = parts.chunks(Self::TOGETHER).map(|parts| {
            let (first, end) = (parts[0][0], parts[parts.len() - 1][1]);
            let part = |part: &&[usize]| {
                let rows = part[0] - first..part[1] - first;
                Part {
                    start: part[0],
                    packed: Packed::borrowing_part(isa, end - first, rows, columns),
                }
            };
            parts.iter().map(part).collect()
        });
        let together = together.collect();
        Self { run, together }
    }

    fn parts(&self) -> impl Iterator<Item = &Part> {
        self.together.iter().flatten()
    }

    fn panels(&self) -> usize {
        self.parts().next().map_or(0, |p| p.packed.panel_count())
    }

    /// Values of the packed weights.
    pub fn len(&self) -> usize {
        let len = |parts: &Vec<Part>| parts.last().map_or(0, |part| part.packed.values_len());
        self.together.iter().map(len).sum()
    }

    /// The whole product, if it is one for a matrix unit.
    pub fn split(&self) -> Option<&Packed> {
        let packed = &self.together[0][0].packed;
        packed.is_split().then_some(packed)
    }

    /// Packs the weights of some products into a value: `fill(product, panels)` writes up to so many
    /// neighbouring panels, each some columns of all rows. Products for a matrix unit are made of a `matrix`
    /// at once, where there is one.
    pub fn pack(
        products: &[&Self],
        memory: &Memory,
        place: ValueId,
        neighbours: usize,
        fill: impl Fn(usize, &[PanelRows]) + Sync,
        matrix: Option<Matrix>,
    ) {
        // At least so many tasks, for several threads to share.
        const TASKS: usize = 8;
        // SAFETY: the value is this step's own.
        let mut values = unsafe { memory.part(place, 0, memory.values(place).len()) };
        let mut tasks = Vec::new();
        for (index, product) in products.iter().enumerate() {
            for parts in &product.together {
                let len = parts.last().map_or(0, |part| part.packed.values_len());
                let (own, rest) = std::mem::take(&mut values).split_at_mut(len);
                for part in parts {
                    part.packed.lend(own.as_mut_ptr());
                }
                values = rest;
            }
            let panels = product.panels();
            let step = (panels * products.len() / TASKS).clamp(1, neighbours);
            let starts = (0..panels).step_by(step);
            tasks.extend(starts.map(|start| (index, start..(start + step).min(panels))));
        }
        memory.pool.run(tasks.len(), |task| {
            let (index, panels) = tasks[task].clone();
            if let (Some(matrix), Some(packed)) = (matrix, products[index].split()) {
                let len = matrix.values.len() / products.len();
                let values = &matrix.values[index * len..][..len];
                // SAFETY: each panel is one task's.
                return unsafe { packed.set_lent_matrix(panels, values, matrix.transposed) };
            }
            WHOLE.with_borrow_mut(|whole| {
                whole.resize_with(whole.len().max(panels.len()), Vec::new);
                let rows_of = |(panel, whole): (usize, &mut Vec<f32>)| {
                    let (mut rows, mut columns) = (Vec::new(), 0..0);
                    for part in products[index].parts() {
                        // SAFETY: each panel is one task's.
                        columns = unsafe { part.packed.lent_rows(panel, whole, &mut rows) };
                    }
                    PanelRows { columns, rows }
                };
                let filled: Vec<PanelRows> = panels.clone().zip(&mut *whole).map(rows_of).collect();
                fill(index, &filled);
                if let Some(packed) = products[index].split() {
                    for (panel, values) in panels.zip(whole) {
                        // SAFETY: as above.
                        unsafe { packed.set_lent_panel(panel, values) };
                    }
                }
            });
        });
    }

    /// # Safety
    /// As [`gemm`]; the rows are those of a product that is stored.
    pub unsafe fn multiply(&self, rows: &mut Rows, taps: &[usize], bias: &[f32]) {
        for parts in &self.together {
            let panels = self.panels();
            // One part is multiplied at once: nothing is read again.
            let step = if parts.len() > 1 { 1 } else { panels.max(1) };
            for panel in (0..panels).step_by(step) {
                for Part { start, packed } in parts {
                    if *start == 0 {
                        rows.replace_outputs();
                    } else {
                        rows.add_to_outputs();
                    }
                    let within = [taps[start / self.run] + start % self.run];
                    let taps = match packed.depth() < self.run {
                        true => &within[..],
                        false => &taps[start / self.run..][..packed.depth() / self.run],
                    };
                    let epilogue = Epilogue {
                        bias: if *start == 0 { bias } else { &[] },
                        activation: None,
                    };
                    // SAFETY: as the caller promises.
                    unsafe { gemm(packed, panel..panel + step, rows, taps, epilogue) };
                }
            }
        }
    }
}
