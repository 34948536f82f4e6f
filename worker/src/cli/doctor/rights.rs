//! What the worker's user may do, tried by the worker itself: polkit answers for who asks, and who runs this command is somebody else.

use super::finding::Finding;
use crate::control::protocol::{Need, RightVerdict, RightView, RightsView};
use crate::systemd::POLKIT_RULE;

const CHECK: &str = "polkit";

pub fn rights(rights: &RightsView) -> Finding {
    let tried = match rights {
        RightsView::Systemd(tried) => tried,
        RightsView::Command { program } => return Finding::info(CHECK, format!("not asked: the worker restarts the supervisor by {program}")),
    };
    let of = |need: Need, verdict: fn(&RightVerdict) -> bool| tried.iter().filter(move |right| right.need == need && verdict(&right.verdict));
    let names = |rights: Vec<&RightView>| rights.iter().map(|right| right.what.as_str()).collect::<Vec<_>>().join(", ");
    let excess: Vec<&RightView> = of(Need::Excess, |verdict| *verdict == RightVerdict::Allowed).collect();
    if !excess.is_empty() {
        return Finding::fail(
            CHECK,
            format!("the worker's user can do more than it needs: {}", names(excess)),
            format!("only {POLKIT_RULE} may speak of that user: look for the other rule in /etc/polkit-1/rules.d and /usr/share/polkit-1/rules.d"),
        );
    }
    for right in of(Need::Needed, |_| true) {
        match &right.verdict {
            RightVerdict::Allowed => {}
            RightVerdict::Refused { reason } => {
                return Finding::fail(
                    CHECK,
                    format!("the worker's user is refused the {}: {reason}", right.what),
                    format!("apt-get install polkitd; the package's rule is {POLKIT_RULE}"),
                );
            }
            RightVerdict::Unknown { reason } => {
                return Finding::warn(
                    CHECK,
                    format!("the {} could not be tried: {reason}", right.what),
                    "systemctl status dbus polkit; apt-get install dbus polkitd",
                );
            }
        }
    }
    let refused = names(of(Need::Excess, |verdict| matches!(verdict, RightVerdict::Refused { .. })).collect());
    let needed = names(of(Need::Needed, |_| true).collect());
    Finding::ok(CHECK, format!("the worker's user may do the {needed}; tried and refused: {refused}"))
}

#[cfg(test)]
mod tests {
    use super::super::finding::Level;
    use super::*;

    fn tried(needed: RightVerdict, excess: RightVerdict) -> Finding {
        let right = |what: &str, need, verdict| RightView { what: what.into(), need, verdict };
        rights(&RightsView::Systemd(vec![right("restart of it", Need::Needed, needed), right("stop of it", Need::Excess, excess)]))
    }

    #[test]
    fn exactly_the_one_right_is_well() {
        let refused = || RightVerdict::Refused { reason: "Interactive authentication required.".into() };
        let unknown = || RightVerdict::Unknown { reason: "no bus".into() };
        for (needed, excess, expected) in [
            (RightVerdict::Allowed, refused(), Level::Ok),
            (RightVerdict::Allowed, unknown(), Level::Ok),
            (refused(), refused(), Level::Fail),
            (RightVerdict::Allowed, RightVerdict::Allowed, Level::Fail),
            (refused(), RightVerdict::Allowed, Level::Fail),
            (unknown(), unknown(), Level::Warn),
        ] {
            let found = tried(needed.clone(), excess.clone());
            assert_eq!(found.level, expected, "{needed:?} {excess:?}");
            assert_eq!(found.fix.is_some(), expected > Level::Info);
        }
        assert!(tried(RightVerdict::Allowed, RightVerdict::Allowed).detail.contains("more than it needs: stop of it"));
        assert_eq!(rights(&RightsView::Command { program: "/bin/x".into() }).level, Level::Info);
    }
}
