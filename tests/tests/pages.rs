//! The pages keep their word: each test that docs/THREATS.md names exists.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn sources(below: &Path, found: &mut BTreeMap<String, Vec<PathBuf>>) {
    for entry in std::fs::read_dir(below).expect("a directory of ours").flatten() {
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        if path.is_dir() {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.entry(name).or_default().push(path);
        }
    }
}

#[test]
fn every_test_that_the_page_of_threats_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let mut files = BTreeMap::new();
    for part in ["ipc", "supervisor", "worker", "tests", "package"] {
        sources(&root.join(part), &mut files);
    }
    let page = std::fs::read_to_string(root.join("docs/THREATS.md")).expect("the page");
    let mut named = 0;
    let mut missing = Vec::new();
    for reference in page.split('`').filter(|part| part.contains(".rs::")) {
        let (file, test) = reference.split_once("::").expect("looked for");
        let file = file.rsplit('/').next().expect("a name");
        let function = format!("fn {test}(");
        let holds = |path: &PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains(&function));
        named += 1;
        if !files.get(file).is_some_and(|paths| paths.iter().any(holds)) {
            missing.push(reference);
        }
    }
    assert!(missing.is_empty(), "not there: {missing:#?}");
    assert!(named > 80, "the page names {named} tests: has it another form now?");
}
