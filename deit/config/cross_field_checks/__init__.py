"""Checks of a configuration that involve several fields; each problem comes with a remedy."""

from deit.config.cross_field_checks.images import check_addresses, check_data, check_views
from deit.config.cross_field_checks.student import (
    check_adapters,
    check_init,
    check_qat,
    check_student,
)
from deit.config.cross_field_checks.teacher import (
    check_crops,
    check_losses,
    check_teacher_mean,
    check_teacher_view,
    check_teachers,
)
from deit.config.cross_field_checks.training import check_optim, check_run

CHECKS = {
    check_addresses: {"data", "init", "teacher", "student", "run"},
    check_data: {"data"},
    check_student: {"student"},
    check_init: {"init", "optim"},
    check_adapters: {"init", "student", "optim"},
    check_qat: {"student", "optim", "run"},
    check_losses: {"loss", "student", "teacher"},
    check_teachers: {"teacher", "student", "loss"},
    check_teacher_mean: {"teacher", "loss"},
    check_views: {"views"},
    check_teacher_view: {"views", "teacher", "loss"},
    check_optim: {"optim", "views", "loss"},
    check_run: {"run", "student", "optim"},
}
"""Each check, and the sections that it reads."""

LIVE_TEACHER_CHECKS = {check_crops: {"views", "teacher", "loss"}}
"""Checks for training, but not for writing targets; the sections that each reads."""
