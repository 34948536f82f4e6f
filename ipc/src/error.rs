//! The closed set of ways in which a request is refused or fails.

use serde::{Deserialize, Serialize};

/// What a request got instead of its answer. Each variant tells the caller what to do about it.
///
/// The sentences never repeat text of the peer's unescaped: names are typed, and `detail` is ours or the kernel's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Error {
    /// The request contradicts itself or a fixed limit: asking again is of no use.
    #[error("invalid {field}: {reason}")]
    Invalid { field: String, reason: String },
    /// No grant opens this. Root can change it in the grants file.
    #[error("denied by {grant} in the grants: {reason}")]
    Denied { grant: String, reason: String },
    /// Somebody else holds what was asked for.
    #[error("conflict with {holder}: {reason}")]
    Conflict { holder: String, reason: String },
    /// The resource is not in a state in which this is legal.
    #[error("wrong state {state}: {reason}")]
    WrongState { state: String, reason: String },
    #[error("not found: {what}")]
    NotFound { what: String },
    /// A limit is reached; with `retry_after_ms` it passes by itself.
    #[error("exhausted: {what} (limit {limit})")]
    Exhausted { what: String, limit: u64, retry_after_ms: Option<u32> },
    /// This host or this version lacks something.
    #[error("unsupported: {missing}")]
    Unsupported { missing: String },
    /// The step did not end within its deadline; it may still end later, and is then seen in the inventory.
    #[error("timeout after {after_ms} ms in {step}")]
    Timeout { step: String, after_ms: u64 },
    /// A newer worker has taken over; this one has nothing more to say.
    #[error("superseded by a newer worker")]
    Superseded,
    /// The host failed us: the step, and the kernel's error number where there is one.
    #[error("failed in {step}: {detail}")]
    Failed { step: String, errno: Option<i32>, detail: String },
}

impl Error {
    pub fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Invalid { field: field.into(), reason: reason.into() }
    }
    pub fn denied(grant: impl Into<String>, reason: impl Into<String>) -> Self {
        Error::Denied { grant: grant.into(), reason: reason.into() }
    }
    /// A failed system call or file operation in the step named.
    pub fn io(step: impl Into<String>, error: &std::io::Error) -> Self {
        Error::Failed { step: step.into(), errno: error.raw_os_error(), detail: error.to_string() }
    }
    /// The word for it in audit records, metrics and exit codes.
    pub fn kind(&self) -> &'static str {
        match self {
            Error::Invalid { .. } => "invalid",
            Error::Denied { .. } => "denied",
            Error::Conflict { .. } => "conflict",
            Error::WrongState { .. } => "wrong-state",
            Error::NotFound { .. } => "not-found",
            Error::Exhausted { .. } => "exhausted",
            Error::Unsupported { .. } => "unsupported",
            Error::Timeout { .. } => "timeout",
            Error::Superseded => "superseded",
            Error::Failed { .. } => "failed",
        }
    }
    /// The kernel's error number, where the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::Failed { errno, .. } => *errno,
            _ => None,
        }
    }
}
