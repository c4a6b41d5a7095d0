//! How a plan's speed bears other processes on its cores, and more threads than cores.
//!
//! Times on a machine that others use too: each claim is tried several times, and one success is
//! enough. A plan that waits for a thread that does not run fails all of them by far: it takes a
//! scheduler's slice (milliseconds) for each of dozens of steps (microseconds).

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use candle_core::Device;
use common::{Formula, images};
use sconce::exec::cpu::{Options, Plan};
use sconce::exec::params::Params;
use sconce::models::registry;

const SIDE: usize = 224;
const TRIES: usize = 6;

/// A small network of many steps, and a photo.
fn network(threads: usize) -> (Plan, Vec<f32>) {
    let row = registry::find("mobilenet_v3_small").unwrap().row;
    let graph = row.architecture.graph(10);
    let vb = Params::new(Some(Formula::of(&graph)), 0).var_builder(&Device::Cpu);
    let outputs = [graph.output()];
    let options = Options::threads(threads);
    let plan = Plan::compile(&graph, &vb, [SIDE; 2], &outputs, options).unwrap();
    (plan, images(1, SIDE, SIDE))
}

/// Time of a hundred passes.
fn time(plan: &mut Plan, image: &[f32]) -> Duration {
    plan.run(image, 1);
    let started = Instant::now();
    for _ in 0..100 {
        plan.run(image, 1);
    }
    started.elapsed()
}

/// Runs `f` while a thread of our own keeps a core busy.
fn beside_a_busy_thread<R>(f: impl FnOnce() -> R) -> R {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let result = f();
        done.store(true, Ordering::Relaxed);
        result
    })
}

/// Asks that at least once the second time is at most `bound` times the first.
fn assert_bounded(what: &str, bound: f64, mut times: impl FnMut() -> [Duration; 2]) {
    let mut ratios = Vec::new();
    for _ in 0..TRIES {
        let [alone, other] = times();
        ratios.push(other.as_secs_f64() / alone.as_secs_f64());
        if ratios.last().is_some_and(|ratio| *ratio <= bound) {
            println!("{what}: {ratios:.2?}, {alone:?} alone");
            return;
        }
    }
    panic!("{what}: {ratios:.2?} times as long, at most {bound} is right");
}

/// One test, so that nothing of our own runs beside it.
#[test]
fn a_plan_is_slower_in_proportion_and_never_stalls() {
    let cores = std::thread::available_parallelism().unwrap().get();
    for threads in [1, 2, cores] {
        let (mut plan, image) = network(threads);
        // With a core shared, no more than half of the speed is gone; the rest is for noise.
        assert_bounded(
            &format!("{threads} threads, a busy one beside"),
            3.5,
            || {
                let alone = time(&mut plan, &image);
                [alone, beside_a_busy_thread(|| time(&mut plan, &image))]
            },
        );
    }
    let (mut few, image) = network(cores);
    let (mut many, _) = network(4 * cores);
    assert_bounded("four threads a core", 3.0, || {
        [time(&mut few, &image), time(&mut many, &image)]
    });
    // A core that is taken away for good: all threads share those that are left.
    assert_bounded("four threads a core, a busy one beside", 5.0, || {
        let alone = time(&mut few, &image);
        [alone, beside_a_busy_thread(|| time(&mut many, &image))]
    });
}
