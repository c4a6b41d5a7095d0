//! What is done while the backbone is frozen: features of all images, and the head that suits them
//! best.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::time::Instant;

use candle_core::Tensor;

use super::error::TrainError;
use super::events::{EpochReport, Event};
use super::fit::{Run, nothing_skipped};
use super::head::{self, Examples};
use super::loss::CrossEntropy;
use super::metrics::Evaluation;
use super::slices::Workers;
use super::source::Features;
use crate::data::{Augment, Augmentation, CacheLimit, Sample, Skipped};
use crate::exec::{Runner, Variables};
use crate::graph::Graph;

/// Values of features up to which mirror images are kept beside the images: half a GiB.
const MIRRORED_VALUES: usize = 128 << 20;

/// The fitted head as an epoch: number 0.
pub(super) struct FirstEpoch {
    pub report: EpochReport,
    pub evaluation: Evaluation,
}

/// The work on a frozen backbone.
pub(super) struct FrozenPart<'a, 'o> {
    run: &'a Run,
    observe: &'a mut (dyn FnMut(Event) + 'o),
    began: Instant,
    /// Names of images that were reported as unreadable.
    pub named: BTreeSet<String>,
    unread: Option<Skipped>,
}

/// Features of the images to train on, where they are wanted, and of those to validate on.
type Known = (Option<Features>, Option<Features>);

impl<'a, 'o> FrozenPart<'a, 'o> {
    pub fn new(run: &'a Run, observe: &'a mut (dyn FnMut(Event) + 'o)) -> Self {
        Self {
            run,
            observe,
            began: Instant::now(),
            named: BTreeSet::new(),
            unread: None,
        }
    }

    /// Computes features of the validation images, and of those to train on where `training` says
    /// so, with their mirror images where a head is to be fitted to them and images vary at all.
    /// None where the run was asked to stop.
    pub fn compute(
        &mut self,
        runner: &mut Runner,
        fits: bool,
        training: bool,
    ) -> Result<Option<Known>, TrainError> {
        let run = self.run;
        let dataset = &run.dataset;
        let train = if training { dataset.train.len() } else { 0 };
        let total = train + dataset.validation.len();
        let mut done = 0;
        let mut known = Known::default();
        if training {
            let width = run.model.architecture.graph(run.model.labels.len());
            let width = width.head().parameters[0].shape[1];
            let mirrored = fits
                && run.settings.augment != Augment::None
                && 2 * train * width <= MIRRORED_VALUES;
            known.0 = self.features(runner, &dataset.train, mirrored, &mut done, total)?;
            match &known.0 {
                None => return Ok(None),
                Some(features) if features.labels.is_empty() => {
                    let Skipped { name, reason } =
                        self.unread.take().unwrap_or_else(nothing_skipped);
                    let epoch = u64::from(!fits);
                    return Err(TrainError::NothingRead {
                        epoch,
                        name,
                        reason,
                    });
                }
                Some(_) => {}
            }
        }
        known.1 = self.features(runner, &dataset.validation, false, &mut done, total)?;
        Ok(known.1.is_some().then_some(known))
    }

    fn features(
        &mut self,
        runner: &mut Runner,
        samples: &[Sample],
        mirrored: bool,
        before: &mut usize,
        total: usize,
    ) -> Result<Option<Features>, TrainError> {
        let run = self.run;
        // Each is read once.
        let plan = run.batch_plan(samples, Augmentation::NONE, &CacheLimit::default());
        let features = Features::compute(
            runner,
            &plan,
            mirrored,
            &run.device,
            &run.ranks,
            &mut |done, skipped| {
                for image in skipped {
                    if self.named.insert(image.name.clone()) {
                        (self.observe)(Event::Skipped(image));
                    }
                    self.unread = Some(image.clone());
                }
                // As many as the others have, by all that is known here.
                let done = (*before + done * run.ranks.count()).min(total);
                (self.observe)(Event::Features { done, total });
                !run.stop.load(Ordering::Relaxed)
            },
        )?;
        *before += samples.len();
        Ok(features)
    }

    /// Fits the head, puts it into the network and validates it. None where the run was asked to
    /// stop.
    pub fn fit_head(
        &mut self,
        graph: &Graph,
        variables: &Variables,
        training: &Features,
        validation: &Features,
        loss: &CrossEntropy,
        workers: &Workers,
    ) -> Result<Option<FirstEpoch>, TrainError> {
        let run = self.run;
        let own = training.tensor.flatten_all()?.to_vec1::<f32>()?;
        let mut views = vec![&own[..]];
        views.extend(training.mirrored.as_deref());
        let examples = Examples {
            views,
            labels: &training.labels,
            classes: run.dataset.classes.len(),
        };
        let go_on = || !run.stop.load(Ordering::Relaxed);
        let Some(head) = head::fit(&examples, loss, run.settings.seed, workers, &go_on) else {
            return Ok(None);
        };
        (self.observe)(Event::Head(&head.report));
        let values = [head.weight, head.bias];
        for (parameter, values) in graph.head().parameters.iter().zip(values) {
            let variable = variables
                .parameters()
                .iter()
                .find(|(n, _)| *n == parameter.name);
            if let Some((_, variable)) = variable {
                variable.set(&Tensor::from_vec(values, variable.shape(), &run.device)?)?;
            }
        }
        let mut evaluation = Evaluation::new(run.dataset.classes.len(), 1.0);
        validation.evaluate(graph, variables.tensors(), &mut evaluation)?;
        if evaluation.images() == 0 {
            let Skipped { name, reason } = self.unread.take().unwrap_or_else(nothing_skipped);
            return Err(TrainError::NothingValidated { name, reason });
        }
        let seconds = self.began.elapsed().as_secs_f64();
        let report = EpochReport {
            epoch: 0,
            train_loss: head.report.loss,
            train_accuracy: head.report.accuracy,
            val_loss: evaluation.loss(),
            val_accuracy: evaluation.accuracy(),
            val_top5: evaluation.top5(),
            val_macro_f1: evaluation.macro_f1(),
            learning_rate: 0.0,
            images_per_second: training.labels.len() as f64 / seconds,
            seconds,
            is_best: false,
        };
        Ok(Some(FirstEpoch { report, evaluation }))
    }
}
