// Draws the charts in the page's colours, again when the theme or the width changes.
(() => {
  const root = document.documentElement;
  const button = document.querySelector("#theme");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const hosts = [...document.querySelectorAll(".chart")];
  const picks = [...document.querySelectorAll("select.pick-arm")];
  const views = new Map();
  let chosen = picks.length ? picks[0].value : "";

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

  // Parameters that the style sheet names are colours; a grid of panels takes the columns that fit.
  function fitted(host) {
    const spec = JSON.parse(document.getElementById(host.dataset.spec).textContent);
    const style = getComputedStyle(root);
    for (const param of spec.params) {
      param.value = style.getPropertyValue("--" + param.name).trim() || param.value;
      const drawn = () => spec.data.values.some((line) => line.arm === chosen);
      if (param.name === "chosen" && drawn()) param.value = chosen;
    }
    if (spec.facet) {
      const room = host.clientWidth - 56; // the first column's axis
      spec.columns = Math.min(5, Math.max(1, Math.floor(room / 130)));
      spec.spec.width = Math.floor(room / spec.columns) - 24;
    } else {
      spec.config.axis.labelLimit = Math.min(170, host.clientWidth * 0.42);
      spec.config.legend.columns = host.clientWidth < 400 ? 3 : 0;
    }
    return spec;
  }

  async function draw(host) {
    views.get(host)?.finalize();
    const options = { mode: "vega-lite", renderer: "svg", actions: false, ast: true };
    try {
      views.set(host, await vegaEmbed(host, fitted(host), options));
    } catch (error) {
      host.textContent = "This chart could not be drawn (" + error.message + "). Its numbers are in the tables.";
    }
  }

  async function drawAll() {
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    for (const host of hosts) await draw(host);
    root.dataset.drawn = "yes";
  }

  button.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    drawAll();
  });
  dark.addEventListener("change", drawAll);

  for (const pick of picks) {
    pick.addEventListener("change", () => {
      chosen = pick.value;
      for (const other of picks) other.value = chosen;
      for (const host of hosts.filter((host) => host.dataset.lines)) draw(host);
    });
  }

  let width = innerWidth;
  let waiting;
  addEventListener("resize", () => {
    if (innerWidth === width) return;
    width = innerWidth;
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });

  button.hidden = false;
  drawAll();
})();
