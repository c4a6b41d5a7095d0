use serde::{Deserialize, Serialize};

/// How the learning rate changes over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Half a cosine wave, down to zero.
    Cosine,
    /// A tenth after each third of the run.
    Step,
    Constant,
}

/// The learning rate as a function of the step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    pub shape: Shape,
    /// The highest rate.
    pub rate: f64,
    /// Steps over which the rate rises to it from near zero.
    pub warmup: u64,
    /// Steps of the whole run.
    pub total: u64,
}

impl Schedule {
    /// The rate of a step, from 0.
    pub fn rate(&self, step: u64) -> f64 {
        if step < self.warmup {
            return self.rate * (step + 1) as f64 / (self.warmup + 1) as f64;
        }
        let length = self.total.saturating_sub(self.warmup).max(1);
        let done = (step - self.warmup) as f64 / length as f64;
        let done = done.min(1.0);
        self.rate
            * match self.shape {
                Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
                // Thirds in whole steps: 2 / 3 is no exact number.
                Shape::Step => 0.1f64.powi(((step - self.warmup) * 3 / length).min(2) as i32),
                Shape::Constant => 1.0,
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(shape: Shape) -> Schedule {
        Schedule {
            shape,
            rate: 0.8,
            warmup: 4,
            total: 34,
        }
    }

    #[test]
    fn the_rate_rises_and_falls() {
        for shape in [Shape::Cosine, Shape::Step, Shape::Constant] {
            let s = schedule(shape);
            assert!((s.rate(0) - 0.16).abs() < 1e-12);
            assert!((s.rate(3) - 0.64).abs() < 1e-12);
            assert!((s.rate(4) - 0.8).abs() < 1e-12);
        }
        let cosine = schedule(Shape::Cosine);
        assert!((cosine.rate(19) - 0.4).abs() < 1e-12);
        assert!(cosine.rate(33) < 0.003 && cosine.rate(33) > 0.0);
        assert_eq!(cosine.rate(34), 0.0);
        let step = schedule(Shape::Step);
        for (at, expected) in [(13, 0.8), (14, 0.08), (23, 0.08), (24, 0.008), (40, 0.008)] {
            assert!((step.rate(at) - expected).abs() < 1e-12, "{at}");
        }
        assert_eq!(schedule(Shape::Constant).rate(33), 0.8);
    }
}
