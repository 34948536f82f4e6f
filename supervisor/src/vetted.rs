//! `Vetted<T>`: the only thing that may be acted on.
//!
//! A handler's `vet` is a pure function of the request, the grants, the ledger and the facts; only this module's `vet`-ers
//! can make a `Vetted`, and the functions that touch the host take nothing else. So "was this checked?" is a question for the compiler.

/// Something that passed its operation's `vet`.
#[derive(Debug)]
pub struct Vetted<T>(T);

impl<T> Vetted<T> {
    /// Called at the end of an operation's `vet` function, and nowhere else (a test greps for it).
    pub(crate) fn by_vet(value: T) -> Self {
        Self(value)
    }
    /// The value, to act on.
    pub fn into_inner(self) -> T {
        self.0
    }
}

impl<T> std::ops::Deref for Vetted<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn only_functions_named_vet_make_a_vetted_value() {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files = vec![root];
        let mut makers = 0;
        while let Some(path) = files.pop() {
            if path.is_dir() {
                files.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            if path.ends_with("vetted.rs") {
                continue;
            }
            for (at, _) in text.match_indices("Vetted::by_vet(") {
                let before = &text[..at];
                let function = before.rfind("fn ").map(|f| &before[f + 3..]).unwrap_or_default();
                assert!(function.starts_with("vet("), "{}: Vetted made outside of fn vet", path.display());
                makers += 1;
            }
        }
        assert!(makers >= 4, "the test no longer finds the makers");
    }
}
