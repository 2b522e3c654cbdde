"""One gradient a task -> one gradient."""

from optimkit.multitask.arbitrate import arbitrate_conflicts as arbitrate_conflicts
from optimkit.multitask.cagrad import cagrad as cagrad
from optimkit.multitask.combine import sum_combiner as sum_combiner
from optimkit.multitask.combine import with_combiner as with_combiner
from optimkit.multitask.gaqat import freeze_low_disorder as freeze_low_disorder
from optimkit.multitask.gcond import accumulate_task_grads as accumulate_task_grads
from optimkit.multitask.gcond import gcond as gcond
from optimkit.multitask.gradnorm import gradnorm as gradnorm
from optimkit.multitask.orthogonal_gradient import odice_value_gradient as odice_value_gradient
from optimkit.multitask.orthogonal_gradient import orthogonal_gradient as orthogonal_gradient
from optimkit.multitask.orthogonal_gradient import project_orthogonal as project_orthogonal
from optimkit.multitask.pcgrad import pcgrad as pcgrad
from optimkit.multitask.sam_gs import equalize_task_norms as equalize_task_norms
from optimkit.multitask.sam_gs import modulate_by_task_momentum as modulate_by_task_momentum
from optimkit.multitask.sam_gs import sam_gs as sam_gs
from optimkit.multitask.sam_gs import sam_gs_optimizer as sam_gs_optimizer
from optimkit.multitask.task_gradients import task_gradients as task_gradients
from optimkit.multitask.tasks import magnitude_similarity as magnitude_similarity
from optimkit.multitask.tasks import mix_tasks as mix_tasks
from optimkit.multitask.tasks import task_cosines as task_cosines
from optimkit.multitask.tasks import task_gram as task_gram
from optimkit.multitask.tasks import task_norms as task_norms
from optimkit.multitask.tasks import task_products as task_products
