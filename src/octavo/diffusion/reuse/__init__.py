"""Deep features kept from one step for the next ones: which steps compute them anew."""

from octavo.diffusion.reuse.forecast import forecast_weights as forecast_weights
from octavo.diffusion.reuse.plan import ReusePlan as ReusePlan
from octavo.diffusion.reuse.plan import cheapest_plan as cheapest_plan
from octavo.diffusion.reuse.plan import segment_costs as segment_costs
from octavo.diffusion.reuse.plan import uniform as uniform
