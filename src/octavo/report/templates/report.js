"use strict";
(() => {
  const $ = (selector, within = document) => within.querySelector(selector);
  const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];
  document.documentElement.classList.add("scripted");
  for (const element of $$("[data-scripted]")) element.hidden = false;

  // Theme: as the system says, light, dark.
  const themes = ["auto", "light", "dark"];
  const theme = $("#theme");
  theme.addEventListener("click", () => {
    const next = themes[(themes.indexOf(theme.dataset.theme) + 1) % themes.length];
    theme.dataset.theme = next;
    theme.textContent = `Theme: ${next}`;
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
  });

  // The contents show which section is being read.
  const links = new Map($$(".contents a").map((link) => [link.hash.slice(1), link]));
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  for (const id of links.keys()) watch.observe(document.getElementById(id));

  // Images: four views, two orders, and a closer look.
  const gallery = $(".gallery");
  if (gallery) {
    const tiles = $$(".tile", gallery);
    for (const input of $$("input[name=view]")) {
      input.addEventListener("change", () => { 
        gallery.dataset.view = input.value;
        $("#difference-scale").hidden = input.value !== "difference";
        $("#sides").hidden = input.value !== "pair";
      });
    }
    const byRank = $$("li", gallery);
    const bySeed = [...byRank].sort((a, b) => a.dataset.seed - b.dataset.seed);
    for (const input of $$("input[name=order]")) {
      input.addEventListener("change", () => gallery.append(...(input.value === "seed" ? bySeed : byRank)));
    }
    const more = $("#more");
    if (more) {
      gallery.dataset.short = "";
      more.addEventListener("click", () => {
        const open = !gallery.toggleAttribute("data-short");
        more.textContent = open ? "Show fewer" : more.dataset.text;
        more.setAttribute("aria-expanded", String(open));
      });
    }
    const closer = $("#closer");
    let shown = 0;
    const show = (tile) => {
      shown = $$(".tile", gallery).indexOf(tile);
      const images = $$("img", tile);
      $$("img", closer).forEach((image, i) => { image.src = images[i].src; image.alt = images[i].alt; });
      $("#closer-title").textContent = `Seed ${tile.parentElement.dataset.seed}, ${tile.parentElement.dataset.psnr} dB`;
    };
    const step = (by) => {
      const now = $$(".tile", gallery);
      show(now[(shown + by + now.length) % now.length]);
    };
    for (const tile of tiles) tile.addEventListener("click", () => { show(tile); closer.showModal(); });
    $("#previous").addEventListener("click", () => step(-1));
    $("#next").addEventListener("click", () => step(1));
    closer.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") step(-1);
      if (event.key === "ArrowRight") step(1);
    });
    closer.addEventListener("click", (event) => { if (event.target === closer) closer.close(); });
  }

  // Heat map: pointer and arrow keys name the layer, the timestep and the error.
  const map = $(".map");
  if (map) {
    const data = JSON.parse($("#errors").textContent);
    const cells = $(".cells", map), tip = $(".tip", map), cursor = $(".cursor", map), told = $("#told");
    const image = $("img", cells);
    let rows = data.layers.map((_, i) => i), row = 0, column = 0;
    const point = () => {
      const width = 100 / data.timesteps.length, height = 100 / rows.length;
      Object.assign(cursor.style, { left: `${column * width}%`, top: `${row * height}%`, width: `${width}%`, height: `${height}%` });
      const error = data.errors[rows[row]][column];
      const value = error === null ? "did not run" : `error ${(100 * error).toPrecision(3)} %`;
      const name = document.createElement("span");
      name.className = "mono";
      name.textContent = data.layers[rows[row]];
      tip.replaceChildren(name, document.createElement("br"), `timestep ${data.timesteps[column]}, ${value}`);
      tip.hidden = cursor.hidden = false;
      const left = Math.min(Math.max(((column + 0.5) * cells.clientWidth) / data.timesteps.length - tip.offsetWidth / 2, 0), cells.clientWidth - tip.offsetWidth);
      const below = ((row + 1) * cells.clientHeight) / rows.length + 8;
      const above = (row * cells.clientHeight) / rows.length - tip.offsetHeight - 8;
      tip.style.left = `${left}px`;
      tip.style.top = `${above > -20 ? above : below}px`;
    };
    const leave = () => { tip.hidden = cursor.hidden = true; };
    cells.addEventListener("pointermove", (event) => {
      const box = cells.getBoundingClientRect();
      column = Math.min(Math.max(Math.floor(((event.clientX - box.left) / box.width) * data.timesteps.length), 0), data.timesteps.length - 1);
      row = Math.min(Math.max(Math.floor(((event.clientY - box.top) / box.height) * rows.length), 0), rows.length - 1);
      point();
    });
    cells.addEventListener("pointerleave", () => { if (document.activeElement !== cells) leave(); });
    cells.addEventListener("blur", leave);
    cells.addEventListener("focus", () => { if (cells.matches(":focus-visible")) point(); });
    cells.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (event.key === "Escape") leave();
      if (!move) return;
      event.preventDefault();
      row = Math.min(Math.max(row + move[0], 0), rows.length - 1);
      column = Math.min(Math.max(column + move[1], 0), data.timesteps.length - 1);
      point();
      told.textContent = tip.innerText;
    });
    for (const input of $$("input[name=rows]")) {
      input.addEventListener("change", () => {
        const worst = input.value === "worst";
        rows = worst ? data.worst : data.layers.map((_, i) => i);
        image.src = worst ? image.dataset.worst : image.dataset.network;
        $(".blocks", map).hidden = worst;
        $(".ranked", map).hidden = !worst;
        leave();
      });
    }
    image.dataset.network = image.src;
  }

  // The study: which figure its dots are.
  for (const input of $$("input[name=figure]")) {
    input.addEventListener("change", () => { $(".study").dataset.figure = input.value; });
  }

  // Copy the lines that load the model.
  for (const button of $$("[data-copy]")) {
    button.addEventListener("click", async () => {
      const text = document.getElementById(button.dataset.copy);
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(text);
        button.textContent = "Selected: copy with the keyboard";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }
})();
