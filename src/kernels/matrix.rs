//! A matrix with many rows that is multiplied from both sides again and again: the samples of a
//! regression, whose sums and whose gradient are such products.
//!
//! It lies in panels of sixteen columns, all rows of a panel one after the other: as the right
//! side of [`transposed::product`] wants them, and as rows of sixteen values a tap for [`gemm`].

use super::Isa;
use super::gemm::{Epilogue, Packed, Rows, gemm};
use super::transposed::{self, PANEL, Panels, pack_row, padded};

/// `[rows, columns]`, with columns of zeros up to whole panels.
pub struct Matrix {
    isa: Isa,
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// A matrix of zeros.
    pub fn zeros(isa: Isa, rows: usize, columns: usize) -> Self {
        Self {
            isa,
            rows,
            columns,
            values: vec![0.0; rows * padded(columns)],
        }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns with those of zeros.
    pub fn padded_columns(&self) -> usize {
        padded(self.columns)
    }

    /// Other values in the place of a row's.
    ///
    /// # Panics
    /// Where there is no such row, or it has another length.
    pub fn set_row(&mut self, row: usize, values: &[f32]) {
        assert!(row < self.rows && values.len() == self.columns);
        // SAFETY: the row's place in every panel.
        unsafe { pack_row(values, self.values.as_mut_ptr(), self.rows * PANEL, row) };
    }

    fn panels(&self) -> Panels {
        Panels {
            pointer: self.values.as_ptr(),
            stride: self.rows * PANEL,
        }
    }

    /// `out = self · right`, `[rows, right's columns]`; the right side has as many rows as this
    /// one has columns, padded.
    ///
    /// # Panics
    /// Where shapes disagree.
    pub fn times(&self, right: &Packed, out: &mut [f32]) {
        let columns = right.columns();
        assert!(right.depth() == self.padded_columns() && out.len() == self.rows * columns);
        let taps: Vec<usize> = (0..self.padded_columns() / PANEL)
            .map(|panel| panel * self.rows * PANEL)
            .collect();
        let mut rows = Rows::new();
        let places = out.chunks_exact_mut(columns);
        for (row, out) in self.values.chunks_exact(PANEL).zip(places) {
            rows.push(row.as_ptr(), out.as_mut_ptr(), None);
        }
        let epilogue = Epilogue {
            bias: &[],
            activation: None,
        };
        // SAFETY: at every tap behind a row's beginning lie sixteen of its values; each output row
        // has all columns.
        unsafe { gemm(right, 0..right.panel_count(), &rows, &taps, epilogue) };
    }

    /// `out = leftᵀ · self`, `[left's columns, self's padded columns]`.
    ///
    /// # Panics
    /// Where shapes disagree.
    pub fn transposed_times(&self, left: &Matrix, out: &mut [f32]) {
        assert!(left.rows == self.rows && out.len() == left.columns * self.padded_columns());
        // SAFETY: both sides have those rows and columns, and the output has room for the product.
        unsafe {
            transposed::product(
                self.isa,
                left.panels(),
                self.panels(),
                self.rows,
                0..left.columns,
                0..self.padded_columns(),
                out.as_mut_ptr(),
                self.padded_columns(),
                false,
            );
        }
    }
}
