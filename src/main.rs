//! Parses the command line, runs it, prints one error, and sets the exit code.

use std::io;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use clap::error::ErrorKind;
use sconce::cli::{self, Cli};

/// Time for the first of several processes to say what is wrong.
const PATIENCE: Duration = Duration::from_secs(2);
/// Nothing could be done.
const FAILURE: u8 = 2;

fn main() -> ExitCode {
    sconce::kernels::memory::set_up_allocator();
    quiet_decoders();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let ranks = match cli.ranks() {
        Ok(ranks) => ranks,
        Err(error) => {
            cli::complain(&format!("{error:#}"));
            return ExitCode::from(FAILURE);
        }
    };
    let (code, error) = match cli.run(&ranks) {
        Ok(outcome) => return ExitCode::from(outcome.exit_code()),
        // Whoever read the results has read enough.
        Err(error) if is_closed_pipe(&error) => (0, None),
        Err(error) => (FAILURE, Some(error)),
    };
    if let Some(error) = error {
        if ranks.is_first() {
            cli::complain(&format!("{error:#}"));
        } else {
            // What is wrong with all, the first one says, and ends them.
            std::thread::sleep(PATIENCE);
            cli::complain(&format!("rank {}: {error:#}", ranks.rank()));
        }
    }
    // The others would wait for this one.
    ranks.abort(code);
    ExitCode::from(code)
}

/// A decoder that panics has met a broken image, which is reported as such.
fn quiet_decoders() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let thread = std::thread::current();
        let decoding = thread
            .name()
            .is_some_and(|n| n.starts_with(sconce::data::THREAD_NAME));
        if !decoding {
            hook(info);
        }
    }));
}

fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(FAILURE)
        }
        _ => {
            let text = error.render().to_string();
            cli::complain(text.trim_start_matches("error: ").trim_end());
            ExitCode::from(FAILURE)
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |e: &io::Error| e.kind() == io::ErrorKind::BrokenPipe;
    error
        .chain()
        .any(|cause| cause.downcast_ref().is_some_and(closed))
}
