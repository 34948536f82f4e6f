//! `vfio.bind`: a PCI function with its whole IOMMU group, all of it or none.

use super::critical;
use super::devices::NoResult;
use super::facts::{self, Picture, VFIO_DRIVER};
use super::record::{Holder, Record, Taken};
use super::sysfs::{self, NotTaken};
use crate::grants::Devices as Granted;
use crate::state::Supervisor;
use crate::vetted::Vetted;
use diarch_ipc::Error;
use diarch_ipc::name::Bdf;
use diarch_ipc::operation::{Bind, Bound, DeviceState, Operation};
use std::rc::Rc;

pub async fn bind(supervisor: &Rc<Supervisor>, row: &'static Operation, ask: &Bind) -> Result<Bound, Error> {
    let tenancy = ask.tenancy;
    let _slot = supervisor.lock(tenancy).await?;
    supervisor.check_state(row, tenancy)?;
    let holder = Holder { tenancy, label: supervisor.with(tenancy, |vm| vm.record.label.clone())? };
    // Without a look at the device: it may be the one that hangs.
    if let Some(answer) = taken_already(supervisor.devices.with(&ask.function).as_ref(), &holder, &ask.function)? {
        return Ok(answer);
    }
    // Where nothing is granted, a worker learns nothing of the host's devices either.
    if supervisor.grants.devices.allow.is_empty() {
        return Err(Error::denied("devices.allow", format!("nothing is in it, and so not {}", ask.function)));
    }
    let function = ask.function.clone();
    let found = supervisor.look(move |host| facts::group_of(host, &function)).await?;
    let group = found.ok_or_else(|| Error::NotFound { what: format!("the PCI function {}", ask.function) })?;
    let mut lock = Some(supervisor.devices.lock(group, supervisor.step_patience()).await?);
    if let Some(answer) = taken_already(supervisor.devices.get(group).as_ref(), &holder, &ask.function)? {
        return Ok(answer);
    }
    if let Some(reason) = supervisor.devices.closed().get(&group) {
        let reason = format!("its record in the supervisor's run directory can't be read ({reason}): nobody knows what it was taken from");
        return Err(Error::Conflict { holder: format!("IOMMU group {group}"), reason });
    }
    let picture = supervisor.look(move |host| facts::look(host, group)).await?;

    let vetted = vet(&supervisor.grants.devices, &ask.function, holder, &picture)?;

    let record = vetted.into_inner();
    supervisor.devices.put(record.clone())?;
    let acted = supervisor.act_on(&record, &mut lock, sysfs::take, |supervisor, record, done| late(supervisor, &record, done)).await;
    match acted {
        Ok(Ok(())) => {}
        Ok(Err(NotTaken { error, left })) => {
            match left {
                None => supervisor.devices.forget(group),
                Some(trouble) => supervisor.quarantine_device(group, format!("it was not taken ({error}), and not all of it went back: {trouble}")),
            }
            return Err(error);
        }
        Err(NoResult::NotBegun(error)) => {
            supervisor.devices.forget(group);
            return Err(error);
        }
        Err(NoResult::Hangs(error)) => return Err(error),
    }
    let record = Record { state: DeviceState::Bound, ..record };
    supervisor.devices.put_or_believe(record.clone());
    Ok(Bound { device: record.shown() })
}

/// The step that hung has ended. Nobody waits for the group, and it was given back.
fn late(supervisor: &Rc<Supervisor>, record: &Record, done: Result<(), NotTaken>) {
    match done {
        Err(NotTaken { left: None, .. }) => {
            supervisor.devices.forget(record.group);
            supervisor.note(&format!("device group {} is the host's again: the step that hung has ended", record.group));
        }
        Err(NotTaken { left: Some(trouble), .. }) => {
            supervisor.quarantine_device(record.group, format!("the step that hung has ended, and not all of it went back: {trouble}"))
        }
        Ok(()) => supervisor.quarantine_device(record.group, "it was taken too late; vfio.release gives it back".into()),
    }
}

/// The same again: the same answer. What another has, or what is quarantined, is nobody's.
fn taken_already(record: Option<&Record>, holder: &Holder, function: &Bdf) -> Result<Option<Bound>, Error> {
    let Some(record) = record else { return Ok(None) };
    if let Some(other) = record.holder.as_ref().filter(|other| other.tenancy != holder.tenancy) {
        return Err(Error::Conflict {
            holder: format!("VM {}", other.label),
            reason: format!("it has {function}, with IOMMU group {} ({})", record.group, record.state.as_str()),
        });
    }
    if record.holder.is_none() && record.state != DeviceState::Quarantined {
        return Err(Error::WrongState { state: record.state.as_str().into(), reason: format!("IOMMU group {} is on its way back to the host", record.group) });
    }
    match record.state {
        DeviceState::Bound | DeviceState::Attached if record.has(function) => Ok(Some(Bound { device: record.shown() })),
        // A bridge of the group, say.
        DeviceState::Bound | DeviceState::Attached => Err(Error::invalid("function", format!("{function} stays with the host when its group is given"))),
        DeviceState::Quarantined => {
            let trouble = record.trouble.clone().unwrap_or_default();
            Err(Error::WrongState { state: record.state.as_str().into(), reason: format!("{function}: {trouble}; vfio.recover or vfio.release may help") })
        }
        // An earlier supervisor's, which is about to be given back: whoever waits for the lock sees it gone.
        DeviceState::Reserved | DeviceState::Resetting => Ok(None),
    }
}

/// Everything that can be refused is refused here.
fn vet(granted: &Granted, function: &Bdf, holder: Holder, picture: &Picture) -> Result<Vetted<Record>, Error> {
    let group = picture.group;
    let Some(asked) = picture.functions.iter().find(|member| member.function == *function) else {
        return Err(Error::NotFound { what: format!("{function} in IOMMU group {group}, where it was a moment ago") });
    };
    if critical::stays(asked) {
        return Err(Error::invalid(
            "function",
            format!("{function} is a bridge (class {:04x}): it stays with the host when its group is given", asked.class >> 8),
        ));
    }
    let members = || picture.functions.iter().filter(|member| !critical::stays(member));
    for member in members() {
        if !granted.allow.iter().any(|grant| grant.covers(&member.function, member.vendor, member.device, member.class)) {
            let what = format!("{} ({:04x}:{:04x}, class {:04x})", member.function, member.vendor, member.device, member.class >> 8);
            let with = if member.function == *function { String::new() } else { format!(" is in IOMMU group {group} with {function}, and") };
            return Err(Error::denied("devices.allow", format!("{what}{with} is covered by no entry; a group is given whole or not at all")));
        }
    }
    critical::judge(picture)?;
    if !picture.vfio_driver {
        return Err(Error::Unsupported {
            missing: format!("the driver {VFIO_DRIVER}: `modprobe {VFIO_DRIVER}`, and its name in a file of /etc/modules-load.d for the next boot"),
        });
    }
    let taken = |member: &facts::Function| Taken {
        function: member.function.clone(),
        path: member.path.clone(),
        vendor: member.vendor,
        device: member.device,
        class: member.class,
        mmio_mib: member.mmio_mib,
        resettable: member.resettable,
        virtual_function: member.virtual_function,
        driver: member.driver.clone(),
        driver_override: member.driver_override.clone(),
    };
    Ok(Vetted::by_vet(Record {
        group,
        state: DeviceState::Reserved,
        holder: Some(holder),
        functions: members().map(taken).collect(),
        trouble: None,
        passing: None,
        node_mode: None,
    }))
}

#[cfg(test)]
mod tests {
    use super::super::critical::tests::{function, picture};
    use super::super::record::tests::{holder, record};
    use super::*;

    fn granted(entries: &str) -> Granted {
        toml::from_str(&format!("allow = [{entries}]")).unwrap()
    }
    fn asked(name: &str) -> Bdf {
        Bdf::new(name).unwrap()
    }
    fn group() -> Picture {
        picture(vec![
            function("0000:64:00.0", 0x06_0400, Some("pcieport")),
            function("0000:65:00.0", 0x03_0200, Some("nvidia")),
            function("0000:65:00.1", 0x04_0300, None),
        ])
    }
    fn judged(entries: &str, name: &str, picture: &Picture) -> Result<Record, Error> {
        vet(&granted(entries), &asked(name), holder(0, "web"), picture).map(Vetted::into_inner)
    }

    #[test]
    fn a_group_is_taken_whole_and_without_its_bridges() {
        let record = judged("\"class:0302\", \"0000:65:00.1\"", "0000:65:00.0", &group()).unwrap();
        assert_eq!(record.state, DeviceState::Reserved);
        let functions: Vec<(&str, Option<&str>)> = record.functions.iter().map(|taken| (taken.function.as_str(), taken.driver.as_deref())).collect();
        assert_eq!(functions, [("0000:65:00.0", Some("nvidia")), ("0000:65:00.1", None)]);
        assert_eq!(judged("\"class:0604\"", "0000:64:00.0", &group()).unwrap_err().kind(), "invalid");
    }

    #[test]
    fn a_member_that_is_not_granted_refuses_the_group_by_its_name() {
        let error = judged("\"class:0302\"", "0000:65:00.0", &group()).unwrap_err().to_string();
        assert!(error.contains("devices.allow") && error.contains("0000:65:00.1") && error.contains("0403"), "{error}");
        let error = judged("", "0000:65:00.0", &group()).unwrap_err().to_string();
        assert!(error.contains("0000:65:00.0 (10de:2330, class 0302) is covered by no entry"), "{error}");
    }

    #[test]
    fn what_the_host_lives_on_is_refused_though_it_is_granted() {
        let mut picture = group();
        picture.functions[2].virtual_functions = 1;
        assert_eq!(judged("\"10de:2330\"", "0000:65:00.0", &picture).unwrap_err().kind(), "conflict");
        let mut picture = group();
        picture.vfio_driver = false;
        assert!(judged("\"10de:2330\"", "0000:65:00.0", &picture).unwrap_err().to_string().contains("modprobe vfio-pci"));
    }

    #[test]
    fn what_is_taken_answers_its_holder_and_names_it_to_others() {
        let function = asked("0000:65:00.0");
        let bound = record(12, DeviceState::Bound);
        assert_eq!(taken_already(Some(&bound), &holder(3, "web"), &function).unwrap().unwrap().device, bound.shown());
        let Err(Error::Conflict { holder: named, .. }) = taken_already(Some(&bound), &holder(4, "db"), &function) else { panic!() };
        assert_eq!(named, "VM web");
        let mut lost = record(12, DeviceState::Quarantined);
        (lost.holder, lost.trouble) = (None, Some("it does not answer".into()));
        assert!(taken_already(Some(&lost), &holder(4, "db"), &function).unwrap_err().to_string().contains("does not answer"));
        assert_eq!(taken_already(Some(&bound), &holder(3, "web"), &asked("0000:64:00.0")).unwrap_err().kind(), "invalid");
        assert!(taken_already(None, &holder(3, "web"), &function).unwrap().is_none());
    }
}
