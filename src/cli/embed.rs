use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;

use super::images::Images;
use super::{Global, Outcome, complain};
use crate::data::{Loaded, Loader, Next, Prepared};
use crate::exec::Runner;
use crate::report::{EmbeddingFile, EmbeddingFormat};
use crate::weights::resolve;

/// Write the vector of each image that a network's head would see
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  sconce embed photos/ -o photos.npy            numpy.load('photos.npy'), paths in photos.json
  sconce embed photos/ -m resnet50 -o photos.safetensors
  find . -name '*.jpg' -print0 | sconce embed --files-from - -0 -o photos.jsonl")]
pub struct Arguments {
    #[command(flatten)]
    images: Images,
    /// The file to write; its ending is its format: .npy, .safetensors or .jsonl
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Images that go through the network together
    #[arg(short, long, value_name = "N", default_value = "8")]
    batch_size: NonZeroUsize,
}

pub fn run(global: &Global, arguments: &Arguments) -> anyhow::Result<Outcome> {
    let inputs = arguments.images.open("embed")?;
    let Some(format) = EmbeddingFormat::of(&arguments.out) else {
        anyhow::bail!(
            "--out {}: is no .npy, .safetensors or .jsonl file",
            arguments.out.display()
        );
    };
    let model = resolve(&global.request())?;
    global.report_weights(&model);
    let device = global.device()?;
    let decoder = arguments.images.decoder(global.exact);
    let loader = Loader::start(inputs, decoder, model.preprocessing, global.threads())
        .context("cannot start threads")?;
    let size = [model.preprocessing.crop; 2];
    let (node, _) = model.graph.features();
    let width = model.graph.shapes(size[0], size[1])?[node.index()].num_elements();
    let mut work = Work {
        runner: model.runner_to(node, &device, size, global.plan_options())?,
        file: EmbeddingFile::create(&arguments.out, format, width)?,
        width,
        done: 0,
        failed: 0,
    };
    let mut pending: Vec<Loaded> = Vec::new();
    loop {
        match loader.next(None::<Duration>) {
            Next::Item(image) => pending.push(image),
            Next::Waiting => {}
            Next::End => break,
        }
        if pending.len() == arguments.batch_size.get() {
            work.batch(&mut pending)?;
        }
    }
    work.batch(&mut pending)?;
    if work.done == 0 {
        return Ok(Outcome::of(0, work.failed));
    }
    work.file.finish()?;
    global.note(&format!(
        "{}: {} vectors of {width} values",
        arguments.out.display(),
        work.done
    ));
    Ok(Outcome::of(work.done, work.failed))
}

struct Work {
    runner: Runner,
    file: EmbeddingFile,
    width: usize,
    done: usize,
    failed: usize,
}

impl Work {
    fn batch(&mut self, pending: &mut Vec<Loaded>) -> anyhow::Result<()> {
        let images: Vec<&Prepared> = pending
            .iter()
            .filter_map(|l| l.result.as_ref().ok())
            .collect();
        let pixels: Vec<&[f32]> = images.iter().map(|i| i.pixels.as_slice()).collect();
        let pixels = pixels.concat();
        let vectors = match images.len() {
            0 => Vec::new(),
            count => self.runner.run(&pixels, count)?,
        };
        let mut vectors = vectors.chunks_exact(self.width);
        for Loaded { name, result } in pending.drain(..) {
            match result {
                Ok(_) => {
                    self.file.add(&name, vectors.next().unwrap_or_default())?;
                    self.done += 1;
                }
                Err(error) => {
                    complain(&format!("{}: {error}", name.escape_debug()));
                    self.file.failed(&name, &error)?;
                    self.failed += 1;
                }
            }
        }
        Ok(())
    }
}
