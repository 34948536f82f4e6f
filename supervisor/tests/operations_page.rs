//! `docs/OPERATIONS.md` is the program's own output.

#[test]
fn the_page_of_operations_is_what_the_program_prints() {
    let page = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/OPERATIONS.md");
    let page = std::fs::read_to_string(page).unwrap();
    let printed = std::process::Command::new(env!("CARGO_BIN_EXE_diarch-supervisor")).args(["operations", "--format", "markdown"]).output().unwrap();
    assert!(printed.status.success());
    assert_eq!(String::from_utf8(printed.stdout).unwrap(), page, "run `make docs`");
}

#[test]
fn the_other_two_formats_hold_every_operation_and_every_column() {
    let printed = |format: &str| {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_diarch-supervisor")).args(["operations", "--format", format]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let json: serde_json::Value = serde_json::from_str(&printed("json")).unwrap();
    let table = printed("table");
    let rows = json["operations"].as_array().unwrap();
    assert_eq!(rows.len(), diarch_ipc::OPERATIONS.len());
    for row in rows {
        for column in ["name", "class", "capability", "states", "fds_in", "fds_out", "secret_fields", "grant", "reason"] {
            assert!(row.get(column).is_some(), "{row} has no {column}");
            assert!(table.lines().next().unwrap().contains(column));
        }
        assert!(table.contains(row["name"].as_str().unwrap()));
    }
}
