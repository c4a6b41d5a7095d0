use std::io;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::{Cli, Outcome};

/// Write completions for a shell
#[derive(Debug, Args)]
#[command(after_help = "Example:
  sconce completions bash > ~/.local/share/bash-completion/completions/sconce")]
pub struct Arguments {
    shell: Shell,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<Outcome> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "sconce", &mut script);
    io::Write::write_all(&mut io::stdout(), &script)?;
    Ok(Outcome::AllDone)
}
