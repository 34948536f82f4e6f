# `make help` lists what there is. Runs as root or as an ordinary user: then only what needs root goes through sudo.

GUEST  := $(CURDIR)/.cache/guest
# The Debian that tests boot, with a systemd of its own.
TREE   := $(CURDIR)/.cache/debian13
# The host with an IOMMU that tests boot, made from it (docs/LAB.md).
LAB    := $(CURDIR)/.cache/lab
TARGET := $(or $(CARGO_TARGET_DIR),target)
# What its kernel lacks for devices by descriptor.
IOMMUFD := $(CURDIR)/.cache/iommufd
# Leads to the package of this version.
DEB    := $(abspath $(TARGET))/diarch.deb

# rustup's directory is not on every PATH, nor are the sbin ones (`ip`, `nft`) on an ordinary user's.
ifeq ($(findstring $(HOME)/.cargo/bin,$(PATH)),)
PATH := $(HOME)/.cargo/bin:$(PATH)
endif
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin

SUDO := $(if $(filter-out 0,$(shell id -u)),sudo -E)

.PHONY: help all build deb demo test test-fast chaos bench lint guest tree lab iommufd docs clean prerequisites
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ' *:.*## ' '/^[a-z -]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' Makefile

# One check per run, for all goals together. (An order-only prerequisite of the rest, so that it comes first under -j too.)
NEEDS := $(sort build $(filter demo deb,$(MAKECMDGOALS)) $(if $(filter test guest tree lab iommufd bench,$(MAKECMDGOALS)),test))
prerequisites:
	@scripts/prerequisites $(NEEDS)

all build: | prerequisites ## the release binaries, in target/release
	cargo build --release --locked --workspace --exclude diarch-package

deb: | prerequisites ## the Debian package, in target/debian
	scripts/deb

demo: build guest ## a VM that survives the death of each half, before your eyes (KEEP=1: it stays afterwards)
	$(SUDO) $(TARGET)/release/diarch-demo --guest $(GUEST) $(if $(filter 1,$(KEEP)),--keep)

# Tests are built as the user who runs make, and only the test executables run as root: no root-owned files in target/,
# and root needs no cargo. cargo takes the runner from the environment; it is empty, thus none, for root.
# All binaries are built first, as tests start those of other crates. Last, the package is built a second time elsewhere: it must be the same bytes.
test: lint guest tree lab iommufd deb ## everything: style, unit tests, and real VMs (needs root)
	cargo build --workspace --all-targets --locked
	$(if $(SUDO),CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='$(SUDO)') DIARCH_GUEST=$(GUEST) DIARCH_TREE=$(TREE) \
		DIARCH_LAB=$(LAB) DIARCH_IOMMUFD=$(IOMMUFD) DIARCH_DEB=$(DEB) cargo test --workspace --locked --no-fail-fast
	scripts/reproducible

test-fast: | prerequisites ## the tests that need no root, no QEMU and no guest
	DIARCH_TEST_FAST=1 cargo test --workspace --locked

# Another seed each time, and printed; ROUNDS=500 SEED=7 repeats what was done before. CHAOS=tree has it take place on the tests' Debian, with the virtiofsd,
# passt and QEMU that are there, and not with this machine's.
chaos: build $(if $(filter tree,$(CHAOS)),tree) ## random operations and random deaths, and nothing lost or left after each round (needs root)
	$(SUDO) $(TARGET)/release/diarch-chaos --rounds $(or $(ROUNDS),2000) $(if $(SEED),--seed $(SEED)) $(if $(filter tree,$(CHAOS)),--tree $(TREE)/tree)

bench: build guest tree lab deb ## how long each step of a VM's life takes (needs root)
	DIARCH_DEB=$(DEB) DIARCH_TREE=$(TREE) DIARCH_LAB=$(LAB) $(SUDO) $(TARGET)/release/diarch-bench --guest $(GUEST)

# Both are components that a Rust toolchain may come without. In CI (CI=true) a skip is a failure.
lint: | prerequisites ## rustfmt and clippy
	@if cargo fmt --version >/dev/null 2>&1; then set -x; cargo fmt --all --check; \
	else echo 'lint: SKIPPED rustfmt: this toolchain lacks it (rustup component add rustfmt)'; [ '$(CI)' != true ]; fi
	@if cargo clippy --version >/dev/null 2>&1; then set -x; cargo clippy --workspace --all-targets --locked -- -D warnings; \
	else echo 'lint: SKIPPED clippy: this toolchain lacks it (rustup component add clippy)'; [ '$(CI)' != true ]; fi

guest: | prerequisites ## the virtual machine that tests and demo run, in .cache/guest
	@tests/guest/build $(GUEST)

tree: | prerequisites ## the Debian that tests boot, in .cache/debian13
	@$(SUDO) tests/debian/build $(TREE)

lab: tree ## the host with an IOMMU and KVM that tests boot under emulation, in .cache/lab
	@$(SUDO) tests/lab/build $(LAB) $(TREE)

iommufd: tree ## modules with which the lab's kernel has iommufd, from Debian's own source of it, in .cache/iommufd
	@$(SUDO) tests/lab/iommufd $(IOMMUFD) $(TREE)

docs: build ## docs/OPERATIONS.md, from the table in the program
	$(TARGET)/release/diarch-supervisor operations --format markdown >docs/OPERATIONS.md.new
	mv docs/OPERATIONS.md.new docs/OPERATIONS.md

# The tree in .cache is root's.
clean: ## remove what was built, the guest and the tests' Debian too
	cargo clean
	$(SUDO) rm -rf .cache
