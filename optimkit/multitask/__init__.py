"""One gradient a task -> one gradient."""

from optimkit.multitask.combine import sum_combiner as sum_combiner
from optimkit.multitask.combine import with_combiner as with_combiner
from optimkit.multitask.sam_gs import equalize_task_norms as equalize_task_norms
from optimkit.multitask.sam_gs import modulate_by_task_momentum as modulate_by_task_momentum
from optimkit.multitask.sam_gs import sam_gs as sam_gs
from optimkit.multitask.sam_gs import sam_gs_optimizer as sam_gs_optimizer
from optimkit.multitask.tasks import magnitude_similarity as magnitude_similarity
from optimkit.multitask.tasks import mix_tasks as mix_tasks
from optimkit.multitask.tasks import task_gram as task_gram
from optimkit.multitask.tasks import task_norms as task_norms
