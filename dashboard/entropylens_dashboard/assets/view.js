(function () {
  const sent = {};
  let thirds = 0;
  const plain = { by: 'step', smooth: 0, scale: 'panel', ratio: 'no' };

  function inAddress(values) {
    const query = new URLSearchParams(window.location.search);
    for (const [name, value] of Object.entries(values)) {
      if (name === 'names' || name === 'more') {
        query.delete(name); // a name may hold a comma: each stands for itself
        for (const one of value || []) query.append(name, one);
        continue;
      }
      const text = Array.isArray(value) ? value.join(',') : value;
      if (text === null || text === undefined || text === '' || text === plain[name]) query.delete(name);
      else query.set(name, text);
    }
    const text = query.toString();
    window.history.replaceState(window.history.state, '', window.location.pathname + (text ? '?' + text : ''));
  }

  function said(name, value) {
    const text = Array.isArray(value) ? value.join('\t') : String(value === null || value === undefined ? '' : value);
    return text === String(plain[name]) ? '' : text;
  }

  function place(value) {
    if (typeof value === 'number') return value;
    const moment = Date.parse(String(value).replace(' ', 'T') + 'Z');
    return Number.isNaN(moment) ? Number(value) : moment / 1000;
  }

  function edges(change) {
    if (!change) return undefined;
    if (change['xaxis.autorange']) return null;
    const range = change['xaxis.range'] || [change['xaxis.range[0]'], change['xaxis.range[1]']];
    if (range[0] === undefined || range[1] === undefined) return undefined;
    return [place(range[0]), place(range[1])];
  }

  function picture(key) {
    const graph = document.getElementById(JSON.stringify({ graph: key })).querySelector('.js-plotly-plot');
    const panel = graph.closest('.panel');
    const style = getComputedStyle(document.documentElement);
    const read = name => style.getPropertyValue(name).trim();
    const axis = { gridcolor: read('--grid'), color: read('--ink') };
    const safe = text => String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;');
    const unit = panel.querySelector('.unit');
    const head = document.querySelector('main h1');
    const layout = Object.assign({}, graph.layout, {
      paper_bgcolor: read('--card'), plot_bgcolor: read('--card'), font: { color: read('--ink') },
      title: { text: safe(panel.getAttribute('aria-label') + ' · ' + head.textContent), font: { size: 14 } },
      margin: { l: 70, r: 20, t: 70, b: 50 } });
    layout.xaxis = Object.assign({}, layout.xaxis, axis);
    layout.yaxis = Object.assign({}, layout.yaxis, axis, { title: { text: safe(unit ? unit.textContent : '') } });
    const name = (head.textContent + ' ' + key).replace(/[^\w.-]+/g, '-').slice(0, 80);
    window.Plotly.downloadImage({ data: graph.data, layout: layout },
      { format: 'png', width: 1200, height: 600, scale: 2, filename: name });
  }

  function triggered() {
    const context = window.dash_clientside.callback_context;
    return context.triggered.length ? context.triggered[0] : null;
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    entropylens: {
      collect: function (values, within, spec, known) {
        const view = {};
        for (const one of window.dash_clientside.callback_context.inputs_list[0])
          view[one.id.control] = one.value === undefined ? null : one.value;
        inAddress(Object.assign({}, view, {
          within: within ? within.join('~') : null, runs: spec && spec.many ? (view.runs || spec.runs) : null }));
        const same = Object.keys(view).every(name => said(name, view[name]) === said(name, (known || {})[name]));
        return same ? window.dash_clientside.no_update : view;
      },
      zoomed: function (changes, within) {
        const cause = triggered();
        const range = cause ? edges(cause.value) : undefined;
        const still = JSON.stringify(range) === JSON.stringify(within);
        return range === undefined || still ? window.dash_clientside.no_update : range;
      },
      lane: function (within, view) {
        const graph = document.querySelector('#lane .js-plotly-plot');
        if (graph && window.Plotly) {
          const isTime = view && view.by === 'time';
          const range = within && within.map(x => isTime ? new Date(x * 1000).toISOString().slice(0, 23) : x);
          window.Plotly.relayout(graph, range ? { 'xaxis.range': range } : { 'xaxis.autorange': true });
        }
        return window.dash_clientside.no_update;
      },
      unzoom: function (clicks) {
        return clicks ? null : window.dash_clientside.no_update;
      },
      beat: function (count, answered) {
        // One question at a time; what was not answered in 8 s is asked again.
        const none = window.dash_clientside.no_update;
        const clock = triggered() ? triggered().prop_id : '';
        const last = sent[clock];
        if (document.hidden) return [none, none];
        if (last && count > last.count && answered !== last.count) {
          const waits = Date.now() - last.at;
          const said = waits < 5000 && !last.lost ? '' : 'The server has not answered since ' +
            new Date(last.heard).toLocaleTimeString() + ': what is shown is from then.';
          if (waits < 8000) return [none, said];
          sent[clock] = { count: count, at: Date.now(), heard: last.heard, lost: true };
          return [count, said];
        }
        sent[clock] = { count: count, at: Date.now(), heard: Date.now(), lost: false };
        return [count, ''];
      },
      awake: function (count) {
        return document.hidden ? window.dash_clientside.no_update : count || 0;
      },
      title: function () {
        window.setTimeout(function () {
          const head = document.querySelector('main h1');
          document.title = head ? head.textContent + ' · entropylens' : 'entropylens';
        }, 0);
        return window.dash_clientside.no_update;
      },
      filtered: function (text) {
        inAddress({ filter: text });
        return window.dash_clientside.no_update;
      },
      third: function (count, asked, answered) {
        // Not before the last was answered; an answer that never comes is waited for a minute.
        const waits = asked && asked !== answered && count > asked && count - asked < 30;
        thirds = (thirds + 1) % 3;
        return thirds || waits ? window.dash_clientside.no_update : count;
      },
      toCompare: function (clicks, rows, prefix) {
        if (clicks && rows && rows.length) {
          const ids = rows.map(row => row.id).slice(0, 50).join(',');
          window.location.assign(prefix + 'compare?runs=' + encodeURIComponent(ids));
        }
        return window.dash_clientside.no_update;
      },
      tagged: function (change, tags) {
        if (!change || !change.length) return window.dash_clientside.no_update;
        const all = Object.assign({}, tags);
        for (const one of change) if (one.colId === 'tags') all[one.data.id] = one.value || '';
        return all;
      },
      lines: function (rows) {
        const ids = rows && rows.ids ? rows.ids : (rows || []).map(row => row.id);
        return ids.slice(0, 24).join('\t');
      },
      take: function (clicks, spec, view, within, home) {
        const cause = triggered();
        if (!cause || !cause.value) return window.dash_clientside.no_update;
        const asked = JSON.parse(cause.prop_id.slice(0, cause.prop_id.lastIndexOf('.')));
        if (asked.as === 'png') picture(asked.take);
        else {
          const query = new URLSearchParams();
          for (const [name, value] of Object.entries(view || {}))
            for (const one of name === 'names' || name === 'more' ? value || [] : [value])
              if (one !== null && one !== undefined && name !== 'runs') query.append(name, one);
          const runs = (view && view.runs) || spec.runs;
          query.set('runs', Array.isArray(runs) ? runs.join(',') : runs);
          query.set('page', spec.page);
          query.set('panel', asked.take);
          if (within) query.set('within', within.join('~'));
          const link = document.createElement('a');
          link.href = home + 'export/figure.' + asked.as + '?' + query.toString();
          link.download = '';
          link.click();
        }
        return window.dash_clientside.no_update;
      },
      larger: function (clicks) {
        const cause = triggered();
        if (!cause || !cause.value) return window.dash_clientside.no_update;
        const key = JSON.parse(cause.prop_id.slice(0, cause.prop_id.lastIndexOf('.'))).larger;
        const graph = document.getElementById(JSON.stringify({ graph: key }));
        graph.closest('.panel').classList.toggle('larger');
        window.dispatchEvent(new Event('resize'));
        return window.dash_clientside.no_update;
      },
      print: function (clicks) {
        if (clicks) window.print();
        return window.dash_clientside.no_update;
      }
    }
  });

  try {
    const kept = window.localStorage.getItem('mantine-color-scheme-value');
    const dark = kept === 'dark' || (kept !== 'light' && matchMedia('(prefers-color-scheme: dark)').matches);
    document.documentElement.setAttribute('data-mantine-color-scheme', dark ? 'dark' : 'light');
  } catch (error) { /* storage may be forbidden: the page then follows the system */ }

  function refit() {
    if (window.Plotly) document.querySelectorAll('.js-plotly-plot').forEach(graph => window.Plotly.Plots.resize(graph));
  }
  window.addEventListener('beforeprint', refit);
  window.addEventListener('afterprint', refit);

  document.addEventListener('keydown', function (event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typed = 'input:not([type=radio]):not([type=checkbox]):not([type=range]), textarea, select';
    if (event.target.matches(typed) || event.target.isContentEditable) {
      if (event.key === 'Escape') event.target.blur();
      return;
    }
    const click = id => { const found = document.getElementById(id); if (found) { event.preventDefault(); found.click(); } };
    const actions = { d: 'theme-toggle', r: 'to-runs', c: 'to-compare', u: 'unzoom', p: 'print', '?': 'help-button' };
    if (actions[event.key]) click(actions[event.key]);
    if (event.key === '/') {
      const field = document.querySelector('#filter, main input:not([type=radio]):not([type=checkbox]):not([type=hidden])');
      if (field) { event.preventDefault(); field.focus(); }
    }
  });
})();
