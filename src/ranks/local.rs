//! Several processes of this program on one machine: starting them, and what each finds of it.

use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A process's number, how many there are, and what they find each other by.
const RANK: &str = "SCONCE_RANK";
const COUNT: &str = "SCONCE_RANKS";
const MEETING: &str = "SCONCE_MEETING";

/// How often the processes are looked at.
const NAP: Duration = Duration::from_millis(50);

/// What a process that was started as one of several finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub rank: usize,
    pub count: usize,
    pub meeting: String,
}

impl Place {
    /// This process's, None where it was started by itself.
    pub fn found() -> Option<Self> {
        let number = |name: &str| std::env::var(name).ok()?.parse().ok();
        Some(Self {
            rank: number(RANK)?,
            count: number(COUNT)?,
            meeting: std::env::var(MEETING).ok()?,
        })
    }
}

/// Runs `count` processes, which `command` makes, until all have ended. Where one fails the others are
/// ended too, and its exit code is the result.
///
/// # Errors
/// Where a process cannot be started.
pub fn run(
    count: usize,
    meeting: &str,
    command: impl Fn() -> std::io::Result<Command>,
) -> std::io::Result<u8> {
    let stop = Arc::new(AtomicBool::new(false));
    // The terminal tells all of its processes itself of Ctrl-C; this one stays until they have ended.
    #[cfg(unix)]
    {
        signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::default())?;
        signal_hook::flag::register(signal_hook::consts::SIGTERM, stop.clone())?;
    }
    let mut processes = Processes(Vec::new());
    for rank in 0..count {
        let process = command()?
            .env(RANK, rank.to_string())
            .env(COUNT, count.to_string())
            .env(MEETING, meeting)
            .spawn()?;
        processes.0.push(process);
    }
    let mut code = 0;
    while !processes.0.is_empty() {
        let mut index = 0;
        while let Some(process) = processes.0.get_mut(index) {
            let Some(status) = process.try_wait()? else {
                index += 1;
                continue;
            };
            drop(processes.0.swap_remove(index));
            // One that was interrupted has saved its work, as the others do then.
            if code == 0 {
                code = code_of(status);
                if ![0, INTERRUPTED].contains(&code) {
                    return Ok(code);
                }
            }
        }
        if stop.swap(false, Ordering::Relaxed) {
            processes.0.iter().for_each(ask_to_end);
        }
        std::thread::sleep(NAP);
    }
    Ok(code)
}

/// Exit code of a run that ended early as asked for.
const INTERRUPTED: u8 = 130;

fn code_of(status: ExitStatus) -> u8 {
    // A signal ended it.
    let code = status.code().unwrap_or(2);
    u8::try_from(code).unwrap_or(2)
}

fn ask_to_end(process: &Child) {
    #[cfg(unix)]
    // SAFETY: a signal to a process of our own that has not been waited for.
    unsafe {
        libc::kill(process.id() as libc::pid_t, libc::SIGTERM);
    }
    #[cfg(not(unix))]
    let _ = process;
}

/// Those that are still running: none outlives this.
struct Processes(Vec<Child>);

impl Drop for Processes {
    fn drop(&mut self) {
        for process in &mut self.0 {
            // It may have ended meanwhile.
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::time::Instant;

    use super::*;

    fn shell(script: &str) -> impl Fn() -> std::io::Result<Command> {
        let script = script.to_string();
        move || {
            let mut command = Command::new("sh");
            command.args(["-c", &script]);
            Ok(command)
        }
    }

    #[test]
    fn each_process_finds_its_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().display();
        let script = format!("echo $SCONCE_RANKS $SCONCE_MEETING > {path}/$SCONCE_RANK");
        assert_eq!(run(3, "here", shell(&script)).unwrap(), 0);
        for rank in 0..3 {
            let told = std::fs::read_to_string(folder.path().join(rank.to_string())).unwrap();
            assert_eq!(told, "3 here\n");
        }
    }

    #[test]
    fn one_that_fails_ends_the_others() {
        let began = Instant::now();
        let script = "if [ $SCONCE_RANK = 1 ]; then exit 7; else exec sleep 60; fi";
        assert_eq!(run(3, "", shell(script)).unwrap(), 7);
        assert!(began.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn those_that_were_interrupted_may_finish() {
        let script = "if [ $SCONCE_RANK = 0 ]; then exit 130; else sleep 0.3; exit 130; fi";
        assert_eq!(run(2, "", shell(script)).unwrap(), 130);
    }
}
