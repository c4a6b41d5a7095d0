//! What the processes of a run tell each other.
//!
//! Every batch is the same as one process would take it; each rank has its part, and gradients are
//! summed. As the sums have the same bits everywhere, so have the weights after each step. The first
//! rank's running statistics are those that count.

use candle_core::{DType, Device, Result, Shape, Tensor, Var};

use crate::data::Batch;
use crate::ranks::{Collectives, Ranks, bytes};

/// Values of gradients that are summed at a time: 1 MiB, enough for a network's bandwidth, and few
/// enough that the first of them are on their way soon.
const BUCKET: usize = 256 << 10;
/// Values of a gradient that is summed by itself, from where it lies.
const LARGE: usize = BUCKET / 4;

/// Gradients on their way to all ranks, summed while the rest of the backward pass runs.
pub(super) struct Exchange<'a> {
    others: &'a dyn Collectives,
    /// Small gradients, flat, and how many values they are.
    bucket: Vec<Tensor>,
    values: usize,
    in_bucket: Vec<Place>,
    /// What each sum that was begun holds.
    begun: Vec<Vec<Place>>,
}

/// A gradient's place among all, and its shape.
type Place = (usize, Shape);

impl<'a> Exchange<'a> {
    pub fn new(others: &'a dyn Collectives) -> Self {
        Self {
            others,
            bucket: Vec::new(),
            values: 0,
            in_bucket: Vec::new(),
            begun: Vec::new(),
        }
    }

    /// Takes a gradient; where the rank is absent from the batch, it adds nothing.
    pub fn add(&mut self, index: usize, gradient: Tensor, absent: bool) -> Result<()> {
        let (count, shape) = (gradient.elem_count(), gradient.shape().clone());
        let device = self.others.device();
        let gradient = match absent {
            true => Tensor::zeros(count, DType::F32, &device)?,
            false => gradient.flatten_all()?.contiguous()?.to_device(&device)?,
        };
        if count >= LARGE {
            self.others.begin_sum(gradient)?;
            self.begun.push(vec![(index, shape)]);
        } else {
            self.values += count;
            self.bucket.push(gradient);
            self.in_bucket.push((index, shape));
            if self.values >= BUCKET {
                self.begin()?;
            }
        }
        self.others.progress();
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        self.others.begin_sum(Tensor::cat(&self.bucket, 0)?)?;
        self.bucket.clear();
        self.values = 0;
        self.begun.push(std::mem::take(&mut self.in_bucket));
        Ok(())
    }

    /// Puts the sums where the gradients were.
    pub fn finish(mut self, gradients: &mut [Option<Tensor>], device: &Device) -> Result<()> {
        if !self.bucket.is_empty() {
            self.begin()?;
        }
        for (sums, places) in self.others.sums()?.into_iter().zip(self.begun) {
            if let [(index, shape)] = &places[..] {
                gradients[*index] = Some(sums.reshape(shape)?.to_device(device)?);
                continue;
            }
            let mut at = 0;
            for (index, shape) in places {
                let own = sums.narrow(0, at, shape.elem_count())?.copy()?;
                at += shape.elem_count();
                gradients[index] = Some(own.reshape(shape)?.to_device(device)?);
            }
        }
        Ok(())
    }
}

/// The first rank's values of variables, to all.
pub(super) fn follow_first<'v>(
    ranks: &Ranks,
    variables: impl Iterator<Item = &'v (String, Var)>,
) -> Result<()> {
    let Some(others) = ranks.others() else {
        return Ok(());
    };
    for (_, variable) in variables {
        let tensor = variable.as_detached_tensor();
        variable.set(&first_ones(others, &tensor)?)?;
    }
    Ok(())
}

/// The first rank's values of a tensor.
pub(super) fn first_ones(others: &dyn Collectives, tensor: &Tensor) -> Result<Tensor> {
    let mut told = bytes::of_f32(&tensor.flatten_all()?.to_vec1::<f32>()?);
    others.broadcast(&mut told);
    Tensor::from_vec(bytes::to_f32(&told), tensor.shape(), tensor.device())
}

/// Values of samples (their logits, or their features), their classes, and which they are.
#[derive(Default)]
pub(super) struct Rows {
    pub values: Vec<f32>,
    /// As many, or none.
    pub mirrored: Vec<f32>,
    pub labels: Vec<usize>,
    pub samples: Vec<usize>,
}

impl Rows {
    /// Takes a batch, and what became of it.
    pub fn add(&mut self, batch: &Batch, values: Vec<f32>) {
        self.values.extend(values);
        self.labels.extend(&batch.labels);
        self.samples.extend(&batch.samples);
    }

    /// Those of all ranks in their order.
    pub fn of_all(self, ranks: &Ranks) -> Self {
        let Some(others) = ranks.others() else {
            return self;
        };
        let numbers = |values: &[usize]| -> Vec<u8> {
            let wide = values.iter().map(|&v| v as u64);
            wide.flat_map(u64::to_le_bytes).collect()
        };
        let back = |bytes: Vec<u8>| -> Vec<usize> {
            let (values, _) = bytes.as_chunks();
            values
                .iter()
                .map(|b| u64::from_le_bytes(*b) as usize)
                .collect()
        };
        let all = |own: Vec<u8>| others.gather(&own).concat();
        Self {
            values: bytes::to_f32(&all(bytes::of_f32(&self.values))),
            mirrored: bytes::to_f32(&all(bytes::of_f32(&self.mirrored))),
            labels: back(all(numbers(&self.labels))),
            samples: back(all(numbers(&self.samples))),
        }
    }
}
