# For `iommufd`, in the directory that the kernel's source was unpacked in: `make -f iommufd.mk tree` lays out what the kernel's own make then builds.
#
# What the configuration would say is said by -D, as the modules' own files look for it; only these look: in the kernel proper nothing differs with it.

define modules/Kbuild
subdir-ccflags-y := -DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1
obj-m := iommu/iommufd/ vfio/
endef
define modules/iommu/iommufd/Makefile
iommufd-y := device.o fault.o hw_pagetable.o io_pagetable.o ioas.o main.o pages.o vfio_compat.o span.o
obj-m := iommufd.o
endef
define modules/vfio/Makefile
vfio-y := vfio_main.o device_cdev.o group.o iommufd.o container.o virqfd.o
obj-m := vfio.o vfio_iommu_type1.o pci/
endef
define modules/vfio/pci/Makefile
vfio-pci-core-y := vfio_pci_core.o vfio_pci_intrs.o vfio_pci_rdwr.o vfio_pci_config.o
vfio-pci-y := vfio_pci.o vfio_pci_igd.o
obj-m := vfio-pci-core.o vfio-pci.o
endef
# The part of lib/interval_tree.c that is compiled with iommufd only; the other part is in the kernel.
define span
#include <linux/interval_tree.h>
#include <linux/bug.h>
endef

files := modules/Kbuild modules/iommu/iommufd/Makefile modules/vfio/Makefile modules/vfio/pci/Makefile

.PHONY: tree $(files)
tree: $(files)
	cp drivers/iommu/*.h modules/iommu/
	$(file >modules/iommu/iommufd/span.c,$(span))
	sed -n '/^#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER/,$$p' lib/interval_tree.c | grep -v EXPORT_SYMBOL >>modules/iommu/iommufd/span.c

$(files): modules
	$(file >$@,$($@))

modules:
	mkdir -p modules/iommu modules/vfio/pci
	cp -r drivers/iommu/iommufd modules/iommu/
	cp drivers/vfio/*.[ch] modules/vfio/
	cp drivers/vfio/pci/*.[ch] modules/vfio/pci/
