//! Starting a kernel of `kernels.cu` on the device that its tensors are on.

use candle_core::{DType, Device, Result, Tensor, bail};

/// A kernel's arguments, as `kernels.cu` has them.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Args {
    pub p: [u64; 8],
    pub i: [i32; 12],
    pub f: [f32; 8],
}

/// How many threads a kernel is given, all its loops going on where these are too few.
#[derive(Clone, Copy)]
pub enum Work {
    /// One for each of so many values.
    Values(usize),
    /// A warp for each of so many rows, whose lanes exchange values.
    Rows(usize),
}

impl Work {
    /// Blocks, and threads of each.
    pub(super) fn grid(self) -> (u32, u32) {
        const MOST: usize = 1 << 13;
        let (blocks, threads) = match self {
            Work::Values(count) => (count.div_ceil(256), 256),
            Work::Rows(count) => (count.div_ceil(4), 4 * 32),
        };
        (blocks.clamp(1, MOST) as u32, threads)
    }
}

/// Values that a kernel may be given at once: it counts them in 32 bits.
const MOST_VALUES: usize = i32::MAX as usize;

/// Runs the kernel `name` for activations of `dtype`. The tensors, contiguous and on one device, are what
/// it reads and what it writes; its outputs must be nobody else's.
///
/// # Errors
/// Where the device fails, or a tensor is too large for one call.
pub fn launch(
    name: &str,
    dtype: DType,
    work: Work,
    tensors: &[Option<&Tensor>],
    ints: &[usize],
    floats: &[f32],
) -> Result<()> {
    let suffix = match dtype {
        DType::F32 => "_f32",
        DType::F16 => "_f16",
        DType::BF16 => "_bf16",
        other => bail!("there are no kernels for {other:?}"),
    };
    launch_as(&format!("{name}{suffix}"), work, tensors, ints, floats)
}

/// The same by a kernel's full name.
///
/// # Errors
/// As [`launch`].
pub fn launch_as(
    name: &str,
    work: Work,
    tensors: &[Option<&Tensor>],
    ints: &[usize],
    floats: &[f32],
) -> Result<()> {
    let mut args = Args::default();
    for (slot, &value) in args.i.iter_mut().zip(ints) {
        *slot = i32::try_from(value).map_err(|_| too_large(value))?;
    }
    args.f[..floats.len()].copy_from_slice(floats);
    for tensor in tensors.iter().flatten() {
        if !tensor.is_contiguous() {
            bail!(
                "{name}: a tensor of shape {:?} is not contiguous",
                tensor.shape()
            );
        }
        if tensor.elem_count() > MOST_VALUES {
            return Err(too_large(tensor.elem_count()));
        }
    }
    let Some(first) = tensors.iter().flatten().next() else {
        bail!("{name}: no tensors");
    };
    match first.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => on_cuda::launch(device, name, work, tensors, args),
        #[cfg(all(target_os = "linux", any(feature = "emulated", test)))]
        Device::Cpu => super::emulated::launch(name, work, tensors, args),
        other => bail!("{name}: there is no such kernel for {other:?}"),
    }
}

fn too_large(count: usize) -> candle_core::Error {
    candle_core::Error::Msg(format!(
        "{count} values at once are too many for the device's kernels (use a smaller batch)"
    ))
}

#[cfg(feature = "cuda")]
mod on_cuda {
    use candle_core::backend::BackendStorage;
    use candle_core::cuda_backend::cudarc::driver::{
        CudaStream, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg, SyncOnDrop,
    };
    use candle_core::cuda_backend::{CudaDType, CudaStorage, WrapErr};
    use candle_core::{CudaDevice, DType, Layout, Result, Storage, Tensor, bail};
    use half::{bf16, f16};

    use super::{Args, Work};

    // What nvcc made of kernels.cu, for any device of the capability or a later one.
    const KERNELS: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

    // Plain numbers in the layout that the kernels declare.
    unsafe impl DeviceRepr for Args {}

    pub fn launch(
        device: &CudaDevice,
        name: &str,
        work: Work,
        tensors: &[Option<&Tensor>],
        mut args: Args,
    ) -> Result<()> {
        let kernel = device.get_or_load_custom_func(name, "sconce", KERNELS)?;
        let stream = device.cuda_stream();
        let storages: Vec<_> = tensors
            .iter()
            .map(|tensor| tensor.map(Tensor::storage_and_layout))
            .collect();
        // Until the kernel has been started, so that what waits for a tensor waits for it.
        let mut uses = Vec::with_capacity(tensors.len());
        for (slot, storage) in args.p.iter_mut().zip(&storages) {
            if let Some((storage, layout)) = storage {
                let Storage::Cuda(storage) = &**storage else {
                    bail!("{name}: a tensor is on another device");
                };
                let (address, used) = address(storage, layout, &stream)?;
                *slot = address;
                uses.push(used);
            }
        }
        let (blocks, threads) = work.grid();
        let config = LaunchConfig {
            grid_dim: (blocks, 1, 1),
            block_dim: (threads, 1, 1),
            shared_mem_bytes: 0,
        };
        let mut builder = kernel.builder();
        builder.arg(&args);
        // SAFETY: the kernel takes one Args, and what its slots point to is as large as the caller's
        // tensors, whose shapes its numbers are.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }

    /// Where a tensor begins in the device's memory.
    fn address<'a>(
        storage: &'a CudaStorage,
        layout: &Layout,
        stream: &'a CudaStream,
    ) -> Result<(u64, SyncOnDrop<'a>)> {
        fn of<'a, T: CudaDType + 'static>(
            storage: &'a CudaStorage,
            layout: &Layout,
            stream: &'a CudaStream,
        ) -> Result<(u64, SyncOnDrop<'a>)> {
            let (address, used) = storage.as_cuda_slice::<T>()?.device_ptr(stream);
            let offset = layout.start_offset() * size_of::<T>();
            Ok((address + offset as u64, used))
        }
        match storage.dtype() {
            DType::F32 => of::<f32>(storage, layout, stream),
            DType::F16 => of::<f16>(storage, layout, stream),
            DType::BF16 => of::<bf16>(storage, layout, stream),
            DType::U8 => of::<u8>(storage, layout, stream),
            other => bail!("there are no kernels for {other:?}"),
        }
    }
}
