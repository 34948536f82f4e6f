//! Processes as `/proc` shows them from outside the machine.

use std::fs;

/// A process of the machine; equal only if it is the same one, not a later one with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// As the machine knows it.
    pub pid: u32,
    /// As the test does.
    pub host_pid: i32,
    /// In clock ticks since the kernel's start.
    pub started: u64,
}

pub fn processes() -> impl Iterator<Item = i32> {
    fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn status_field(pid: i32, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).map(|value| value.trim().to_owned())
}

/// Its number in each PID namespace, from ours inwards.
pub fn ns_pids(pid: i32) -> Vec<u32> {
    status_field(pid, "NSpid").unwrap_or_default().split_whitespace().filter_map(|n| n.parse().ok()).collect()
}

pub fn ancestors(pid: i32) -> impl Iterator<Item = i32> {
    let parent = |pid: &i32| status_field(*pid, "PPid")?.parse().ok().filter(|parent| *parent > 0);
    std::iter::successors(Some(pid), parent).skip(1)
}

pub fn name_of(pid: i32) -> String {
    status_field(pid, "Name").unwrap_or_default()
}

pub fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets; what follows the last one is numbers. proc_pid_stat(5): the 22nd, the 20th after the name.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
