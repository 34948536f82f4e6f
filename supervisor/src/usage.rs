//! What `diarch-supervisor --help` prints. Its manual page is made from this text, whose shape is therefore held by a test there: one line of
//! what it is; each command's usage, indented by two, with its sentence under it, indented by six; then sections, each with its name and a colon.

pub const HELP: &str = "\
diarch-supervisor: the privileged half of Diarch

  diarch-supervisor [run] [--grants FILE] [--run-dir DIR] [--audit FILE] [--socket PATH] [--host-root STAGE]
      Serve, on the socket that systemd passes on or on PATH (default: DIR/supervisor.sock). Needs root. With STAGE, devices are a fixture's and not this machine's.
  diarch-supervisor --rehearse STAGE --grants FILE --run-dir DIR --audit FILE
      As an ordinary user: serve over the host that STAGE/sys, STAGE/proc and STAGE/dev show, and say in the audit what only root can do.
  diarch-supervisor operations [--format table|json|markdown]
      Print everything that it can be asked to do.
  diarch-supervisor check-grants FILE
      Say whether a grants file would be accepted.
  diarch-supervisor probe-kvm
      Let a tiny guest run under KVM, and say in one line what became of it.
  diarch-supervisor --version | --help

Defaults: --grants /etc/diarch/grants.toml, --run-dir /run/diarch, --audit /var/log/diarch/audit.jsonl

Exit codes:
  0   done
  1   failed, or the checked grants are refused
  2   wrong usage
  78  not started: the grants or the passed-on socket are refused
";
