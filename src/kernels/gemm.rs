//! Matrix products, by the `gemm` crate on the calling thread.

/// A strided view of a float32 matrix.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major, `row_stride` values from one row to the next.
    ///
    /// # Panics
    /// Where `data` is too short.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        check_extent(data.len(), rows, cols, row_stride);
        Self {
            data,
            rows,
            cols,
            row_stride,
            col_stride: 1,
        }
    }

    /// The transposed view.
    pub fn transposed(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// `out = alpha · a · b`, where `out` is row-major with `row_stride` values from row to row;
/// values between its rows are left alone.
///
/// # Panics
/// Where the inner dimensions differ or `out` is too short.
pub fn gemm(out: &mut [f32], row_stride: usize, alpha: f32, a: Matrix, b: Matrix) {
    assert_eq!(a.cols, b.rows, "inner dimensions of a product");
    check_extent(out.len(), a.rows, b.cols, row_stride);
    // SAFETY: the extents of all three matrices were checked against their slices, `out` is
    // borrowed mutably so that it overlaps neither operand, and strides fit isize since the
    // slices do.
    unsafe {
        gemm::gemm(
            a.rows,
            b.cols,
            a.cols,
            out.as_mut_ptr(),
            1,
            row_stride as isize,
            false,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            0.0,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

fn check_extent(len: usize, rows: usize, cols: usize, row_stride: usize) {
    assert!(cols <= row_stride, "rows of a matrix overlap");
    assert!(rows > 0 && cols > 0, "a matrix without values");
    assert!((rows - 1) * row_stride + cols <= len, "a matrix too short");
}
