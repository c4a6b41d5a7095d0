//! Convolutions by cuDNN, on images `[N, H, W, C]` and weights `[K, kh, kw, C / groups]`.
//!
//! The algorithms are fixed, not searched for: those that take this layout, use the tensor cores, and give
//! the same bits each time.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::cudnn::{
    ConvBackwardData, ConvBackwardFilter, ConvForward, Cudnn, CudnnDataType, CudnnError, sys,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::cuda_backend::{CudaDType, CudaStorage, DeviceId};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, DType, Device, Error, Result, Storage, Tensor, WithDType, bail};
use half::{bf16, f16};

use super::ops::Windows;
use crate::graph::{Conv2d, Padding};

const LAYOUT: sys::cudnnTensorFormat_t = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;

/// Whether it computes this convolution: padding has to be the same on both sides, and for depthwise ones
/// our own kernels are.
pub fn takes(c: &Conv2d) -> bool {
    matches!(c.padding, Padding::Symmetric(_)) && !c.is_depthwise()
}

/// Whether cuDNN says that it cannot do this, and another way has to be taken.
pub fn is_not_supported(error: &Error) -> bool {
    error.to_string().contains("NOT_SUPPORTED")
}

/// What is computed.
#[derive(Clone, Copy)]
enum Pass {
    Forward,
    Input,
    Weights,
}

/// `[N, H, W, C]` to `[N, H', W', K]`.
pub fn forward(windows: &Windows, groups: usize, x: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let shape = windows.output_shape(weights.dim(0)?);
    run(Pass::Forward, windows, groups, [x, weights], &shape)
}

/// The input's gradient, from the output's.
pub fn backward_input(
    windows: &Windows,
    groups: usize,
    g: &Tensor,
    weights: &Tensor,
) -> Result<Tensor> {
    run(Pass::Input, windows, groups, [g, weights], &windows.input)
}

/// The weights' gradient `[K, kh, kw, C / groups]`.
pub fn backward_weights(
    windows: &Windows,
    groups: usize,
    g: &Tensor,
    x: &Tensor,
) -> Result<Tensor> {
    let ([kh, kw], channels) = (windows.kernel, windows.input[3]);
    let shape = [g.dim(3)?, kh, kw, channels / groups];
    run(Pass::Weights, windows, groups, [g, x], &shape)
}

fn run(
    pass: Pass,
    windows: &Windows,
    groups: usize,
    operands: [&Tensor; 2],
    shape: &[usize; 4],
) -> Result<Tensor> {
    match operands[0].dtype() {
        DType::F32 => run_as::<f32>(pass, windows, groups, operands, shape),
        DType::F16 => run_as::<f16>(pass, windows, groups, operands, shape),
        DType::BF16 => run_as::<bf16>(pass, windows, groups, operands, shape),
        other => bail!("cuDNN does not compute in {other:?}"),
    }
}

fn run_as<T: CudaDType + CudnnDataType + DeviceRepr + WithDType>(
    pass: Pass,
    windows: &Windows,
    groups: usize,
    [a, b]: [&Tensor; 2],
    shape: &[usize; 4],
) -> Result<Tensor> {
    let Device::Cuda(device) = a.device() else {
        bail!("cuDNN computes on CUDA devices only");
    };
    if !(a.is_contiguous() && b.is_contiguous()) {
        bail!("cuDNN was given a tensor that is not contiguous");
    }
    let [(a_storage, a_layout), (b_storage, b_layout)] =
        [a.storage_and_layout(), b.storage_and_layout()];
    let (Storage::Cuda(a_storage), Storage::Cuda(b_storage)) = (&*a_storage, &*b_storage) else {
        bail!("cuDNN was given a tensor on another device");
    };
    let a_slice = a_storage.as_cuda_slice::<T>()?;
    let b_slice = b_storage.as_cuda_slice::<T>()?;
    let a_view = a_slice.slice(a_layout.start_offset()..);
    let b_view = b_slice.slice(b_layout.start_offset()..);
    let cudnn = handle(device)?;
    let outputs = match pass {
        Pass::Forward => shape[3],
        Pass::Input | Pass::Weights => a.dim(3)?,
    };
    let [n, h, w, c] = windows.input.map(|v| v as i32);
    let ([oh, ow], [kh, kw]) = (windows.output, windows.kernel);
    let pixels = |n, c, h, w| cudnn.create_4d_tensor::<T>(LAYOUT, [n, c, h, w]);
    let x = pixels(n, c, h, w).map_err(failed)?;
    let y = pixels(n, outputs as i32, oh as i32, ow as i32).map_err(failed)?;
    let filter = [outputs as i32, c / groups as i32, kh as i32, kw as i32];
    let filter = cudnn
        .create_4d_filter::<T>(LAYOUT, filter)
        .map_err(failed)?;
    // float32 sums, whatever the factors are.
    let mut conv = cudnn
        .create_conv2d::<f32>(
            windows.padding.map(|v| v as i32),
            [windows.stride as i32; 2],
            [1; 2],
            sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION,
        )
        .map_err(failed)?;
    conv.set_group_count(groups as i32).map_err(failed)?;
    let strict =
        a.dtype() == DType::F32 && !candle_core::cuda_backend::gemm_reduced_precision_f32();
    conv.set_math_type(match strict {
        true => sys::cudnnMathType_t::CUDNN_FMA_MATH,
        false => sys::cudnnMathType_t::CUDNN_TENSOR_OP_MATH,
    })
    .map_err(failed)?;
    let numbers = (T::from_f64(1.0), T::from_f64(0.0));
    let room = |bytes: usize| {
        // SAFETY: nothing reads the room before cuDNN has written to it.
        unsafe { device.alloc::<u8>(bytes.max(1)) }
    };
    // SAFETY: the pass below writes all of it.
    let mut out = unsafe { device.alloc::<T>(shape.iter().product()) }?;
    // SAFETY, of all three: the descriptors say what the slices are.
    match pass {
        Pass::Forward => {
            let algorithm =
                sys::cudnnConvolutionFwdAlgo_t::CUDNN_CONVOLUTION_FWD_ALGO_IMPLICIT_PRECOMP_GEMM;
            let pass = ConvForward {
                conv: &conv,
                x: &x,
                w: &filter,
                y: &y,
            };
            let mut room = room(pass.get_workspace_size(algorithm).map_err(failed)?)?;
            let room = Some(&mut room);
            unsafe { pass.launch(algorithm, room, numbers, &a_view, &b_view, &mut out) }
        }
        Pass::Input => {
            let algorithm = sys::cudnnConvolutionBwdDataAlgo_t::CUDNN_CONVOLUTION_BWD_DATA_ALGO_1;
            let pass = ConvBackwardData {
                conv: &conv,
                dx: &x,
                w: &filter,
                dy: &y,
            };
            let mut room = room(pass.get_workspace_size(algorithm).map_err(failed)?)?;
            let room = Some(&mut room);
            unsafe { pass.launch(algorithm, room, numbers, &mut out, &b_view, &a_view) }
        }
        Pass::Weights => {
            let algorithm =
                sys::cudnnConvolutionBwdFilterAlgo_t::CUDNN_CONVOLUTION_BWD_FILTER_ALGO_1;
            let pass = ConvBackwardFilter {
                conv: &conv,
                x: &x,
                dw: &filter,
                dy: &y,
            };
            let mut room = room(pass.get_workspace_size(algorithm).map_err(failed)?)?;
            let room = Some(&mut room);
            unsafe { pass.launch(algorithm, room, numbers, &b_view, &mut out, &a_view) }
        }
    }
    .map_err(failed)?;
    Ok(tensor(out, device, shape))
}

fn failed(error: CudnnError) -> Error {
    Error::Msg(format!("cuDNN: {error}"))
}

fn tensor<T: CudaDType>(values: CudaSlice<T>, device: &CudaDevice, shape: &[usize; 4]) -> Tensor {
    let storage = Storage::Cuda(CudaStorage::wrap_cuda_slice(values, device.clone()));
    Tensor::from_storage(storage, shape.as_slice(), BackpropOp::none(), false)
}

/// cuDNN's state, one for each device and thread: it may not be shared.
fn handle(device: &CudaDevice) -> Result<Arc<Cudnn>> {
    thread_local! {
        static HANDLES: RefCell<HashMap<DeviceId, Arc<Cudnn>>> = RefCell::default();
    }
    HANDLES.with_borrow_mut(|handles| {
        if let Some(handle) = handles.get(&device.id()) {
            return Ok(handle.clone());
        }
        let handle = Cudnn::new(device.cuda_stream()).map_err(failed)?;
        handles.insert(device.id(), handle.clone());
        Ok(handle)
    })
}
